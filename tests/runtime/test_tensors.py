import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trtforge.runtime.errors import ArtifactError
from trtforge.runtime.tensors import load_tensors, save_tensors

DTYPES = [
    np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn,
    np.int64, np.int32, np.int8, np.uint8, np.bool_,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3)])
def test_every_dtype_and_rank_comes_back(tmp_path, dtype, shape):
    array = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape) if shape else np.array(1).astype(dtype)
    save_tensors(tmp_path / "t.safetensors", {"x": array})
    loaded, metadata = load_tensors(tmp_path / "t.safetensors")
    assert metadata == {}
    assert loaded["x"].dtype == array.dtype
    assert loaded["x"].shape == array.shape
    assert loaded["x"].tobytes() == array.tobytes()
    loaded["x"][...] = 0


@given(
    array=hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=4, max_side=5), elements=st.floats(width=32)),
    data=st.data(),
)
def test_strided_and_transposed_arrays_keep_their_values(tmp_path_factory, array, data):
    view = array.transpose(data.draw(st.permutations(range(array.ndim))))[::-1, ...][::2]
    path = tmp_path_factory.mktemp("strided") / "t.safetensors"
    save_tensors(path, {"x": view})
    np.testing.assert_array_equal(load_tensors(path)[0]["x"], view)


def test_big_endian_arrays_keep_their_values(tmp_path):
    save_tensors(tmp_path / "t.safetensors", {"x": np.arange(3, dtype=">f4")})
    np.testing.assert_array_equal(load_tensors(tmp_path / "t.safetensors")[0]["x"], [0, 1, 2])


def test_metadata_comes_back_and_bytes_are_deterministic(tmp_path):
    tensors = {"b/ü": np.ones(2, np.float32), "a": np.zeros((), np.int64)}
    metadata = {name: name for name in "qwertyuiop"}
    save_tensors(tmp_path / "1", tensors, metadata)
    save_tensors(tmp_path / "2", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    loaded, read = load_tensors(tmp_path / "1")
    assert read == metadata
    assert list(loaded) == ["a", "b/ü"]


def test_foreign_files_give_their_own_metadata(tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1)}, tmp_path / "t", metadata={"format": "np"})
    assert load_tensors(tmp_path / "t")[1] == {"format": "np"}


def test_no_tensors_at_all(tmp_path):
    save_tensors(tmp_path / "t", {})
    assert load_tensors(tmp_path / "t") == ({}, {})


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_file_cut_short_is_refused(tmp_path, keep):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"x": np.arange(100)}, {"k": "v"})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"t\.safetensors"):
        load_tensors(path)


def test_missing_file_and_unwritable_place(tmp_path):
    with pytest.raises(ArtifactError, match="cannot read"):
        load_tensors(tmp_path / "absent")
    with pytest.raises(ArtifactError, match="cannot write"):
        save_tensors(tmp_path / "absent" / "t", {"x": np.zeros(1)})


def test_a_dtype_that_the_format_lacks_is_named(tmp_path):
    with pytest.raises(TypeError, match="'x' has dtype int4"):
        save_tensors(tmp_path / "t", {"x": np.zeros(2, ml_dtypes.int4)})
