"""The models of `benchmarks/zoo.py`: what each is made of, the inputs it takes, and which of their axes are dynamic.

Weights are random and seeded. What libraries initialise so that nothing comes out (zero heads, LayerScale of 1e-6, a
last BatchNorm of weight zero, unused position tables) is drawn anew, so that equality of outputs says something.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["MODELS", "ZooModel", "make"]

BATCH = (1, 2, 4)
LENGTH = (8, 16, 32)


@dataclass(frozen=True)
class ZooModel:
    """One model: `build` makes it, `example` its inputs, `shapes` names their dynamic axes."""

    name: str
    library: str
    build: Callable[[], nn.Module]
    example: Callable[[], dict[str, torch.Tensor]]
    shapes: dict[str, tuple[str | int | None, ...]]

    @property
    def dims(self) -> dict[str, tuple[int, int, int]]:
        used = {dim for shape in self.shapes.values() for dim in shape}
        return {name: size for name, size in (("batch", BATCH), ("length", LENGTH)) if name in used}


def make(model: ZooModel) -> nn.Module:
    """The model in eval mode, its vacuous parameters drawn anew, its BatchNorms scaled to random inputs."""
    torch.manual_seed(0)
    module = model.build().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            enliven(name, parameter)
        # Statistics of 0 and 1 let a deep network's signal die out, so that it would answer all inputs alike; means
        # taken off would magnify small differences, noise among them.
        hooks = [
            part.register_forward_pre_hook(scale_to_one)
            for part in module.modules()
            if isinstance(part, nn.modules.batchnorm._BatchNorm)
        ]
        if hooks:
            module(**{name: torch.randn(8, *x.shape[1:]) for name, x in model.example().items()})
        for hook in hooks:
            hook.remove()
    return module


def scale_to_one(norm: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    x, variance, mean = args[0], norm.running_var, norm.running_mean
    assert isinstance(variance, torch.Tensor)
    assert isinstance(mean, torch.Tensor)
    mean.zero_()
    variance.copy_(x.square().mean([axis for axis in range(x.ndim) if axis != 1]))
    variance.clamp_(min=0.1 * float(variance.mean()))


def enliven(name: str, parameter: torch.Tensor) -> None:
    if not parameter.is_floating_point() or not parameter.numel():
        return
    largest = float(parameter.abs().max())
    if parameter.ndim >= 2 and largest < 1e-3:
        parameter.normal_(0, 0.02)
    elif parameter.ndim <= 1 and largest < 1e-3:
        bias = name.rpartition(".")[2] in ("bias", "b", "beta")
        parameter.normal_(0, 0.02) if bias else parameter.uniform_(0.5, 1.0)


def _images(name: str, library: str, build: Callable[[], nn.Module], size: int, argument: str = "x") -> ZooModel:
    def example() -> dict[str, torch.Tensor]:
        return {argument: torch.randn(2, 3, size, size)}

    return ZooModel(name, library, build, example, {argument: ("batch", 3, size, size)})


def _torchvision(name: str, size: int = 64, **kwargs: Any) -> ZooModel:
    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **kwargs)

    return _images(name, "torchvision", build, size, "input" if name in _CALLED_INPUT else "x")


_CALLED_INPUT = ("lraspp_mobilenet_v3_large",)


def _raft() -> ZooModel:
    def build() -> nn.Module:
        import torchvision

        class Flow(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.raft = torchvision.models.optical_flow.raft_small(weights=None)

            def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
                return self.raft(first, second, num_flow_updates=2)[-1]

        return Flow()

    shape = ("batch", 3, 128, 128)
    return ZooModel(
        "raft_small", "torchvision", build,
        lambda: {"first": torch.rand(2, 3, 128, 128), "second": torch.rand(2, 3, 128, 128)},
        {"first": shape, "second": shape},
    )  # fmt: skip


def _detector(name: str) -> ZooModel:
    def build() -> nn.Module:
        import torchvision

        class Detector(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = torchvision.models.get_model(name, weights=None, weights_backbone=None)

            def forward(self, x: torch.Tensor) -> Any:
                return self.model(list(x))

        return Detector()

    return _images(name, "torchvision", build, 128)


def _timm(name: str, size: int | None = None, **kwargs: Any) -> ZooModel:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=10, **kwargs)

    return _images(f"timm/{name}", "timm", build, size or 224)


def _transformer(name: str, kind: str, config: str, inputs: str = "text", **settings: Any) -> ZooModel:
    def build() -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**settings)
        module: nn.Module = getattr(transformers, kind)(made)
        if "num_local_experts" in settings:  # the default calls an operator of transformers' own, which has no ONNX
            module.set_experts_implementation("batched_mm")
        return module

    ids = ("batch", "length")
    size = int(settings.get("image_size", 64)) if not isinstance(settings.get("image_size"), list) else 64
    image = ("batch", 3, size, size)
    words = settings.get("vocab_size", 100)

    def text() -> dict[str, torch.Tensor]:
        mask = torch.ones(2, 16, dtype=torch.int64)
        mask[0, 12:] = 0
        return {"input_ids": torch.randint(3, words, (2, 16)), "attention_mask": mask}

    tables: dict[str, tuple[Callable[[], dict[str, torch.Tensor]], dict[str, Any]]] = {
        "text": (text, {"input_ids": ids, "attention_mask": ids}),
        "ids": (lambda: {"input_ids": torch.randint(3, words, (2, 16))}, {"input_ids": ids}),
        "seq2seq": (
            lambda: text() | {"decoder_input_ids": torch.randint(3, words, (2, 16))},
            {"input_ids": ids, "attention_mask": ids, "decoder_input_ids": ("batch", 16)},
        ),
        "image": (lambda: {"pixel_values": torch.randn(2, 3, size, size)}, {"pixel_values": image}),
        "image+text": (
            lambda: text() | {"pixel_values": torch.randn(2, 3, size, size)},
            {"input_ids": ids, "attention_mask": ids, "pixel_values": image},
        ),
        "audio": (lambda: {"input_values": torch.randn(2, 4000)}, {"input_values": ("batch", 4000)}),
        "mel": (lambda: {"input_features": torch.randn(2, 16, 64)}, {"input_features": ("batch", 16, 64)}),
    }
    example, shapes = tables[inputs]
    return ZooModel(f"hf/{name}", "transformers", build, example, shapes)


_SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 64, "max_position_embeddings": 64}  # fmt: skip
_CAUSAL = {**_SMALL, "use_cache": False, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
           "eos_token_id": 2}  # fmt: skip
_VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
           "image_size": 64, "patch_size": 16}  # fmt: skip
_CLIP_TEXT = {**_SMALL, "projection_dim": 16, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}

MODELS: tuple[ZooModel, ...] = (
    _torchvision("resnet18"),
    _torchvision("squeezenet1_1"),
    _torchvision("mobilenet_v2"),
    _torchvision("mobilenet_v3_small"),
    _torchvision("mnasnet0_5"),
    _torchvision("shufflenet_v2_x0_5"),
    _torchvision("efficientnet_b0"),
    _torchvision("regnet_y_400mf"),
    _torchvision("convnext_tiny"),
    _torchvision("vit_b_16", 64, image_size=64),
    _torchvision("swin_t"),
    _torchvision("swin_v2_t"),
    _torchvision("maxvit_t", 224),
    _torchvision("fcn_resnet50", weights_backbone=None),
    _torchvision("deeplabv3_mobilenet_v3_large", 96, weights_backbone=None),
    _torchvision("lraspp_mobilenet_v3_large", 96, weights_backbone=None),
    _raft(),
    _detector("ssdlite320_mobilenet_v3_large"),
    _timm("resnet10t", 96),
    _timm("convnextv2_atto", 64),
    _timm("efficientnet_lite0", 64),
    _timm("mobilenetv4_conv_small", 64),
    _timm("mobilenetv3_small_050", 64),
    _timm("ghostnet_050", 64),
    _timm("repvgg_a0", 64),
    _timm("nf_regnet_b0", 64),
    _timm("vit_tiny_patch16_224", 64, img_size=64),
    _timm("deit_tiny_distilled_patch16_224", 64, img_size=64),
    _timm("beit_base_patch16_224", 64, img_size=64, depth=2),
    _timm("eva02_tiny_patch14_224", 56, img_size=56),
    _timm("swin_tiny_patch4_window7_224", 64, img_size=64, window_size=4),
    _timm("swinv2_tiny_window8_256", 64, img_size=64, window_size=4),
    _timm("gmlp_s16_224", 64, img_size=64),
    _timm("poolformer_s12", 64),
    _timm("edgenext_xx_small", 64),
    _timm("mobilevit_xxs", 64),
    _timm("maxvit_pico_rw_256", 64, img_size=64),
    _timm("coatnet_pico_rw_224", 64, img_size=64),
    _timm("levit_128s", 224),
    _timm("xcit_nano_12_p16_224", 64),
    _timm("pvt_v2_b0", 64),
    _timm("efficientformerv2_s0", 224),
    _timm("fastvit_t8", 64),
    _timm("davit_tiny", 64),
    _timm("mambaout_femto", 64),
    _transformer("bert", "BertModel", "BertConfig", **_SMALL),
    _transformer("roberta", "RobertaModel", "RobertaConfig", **{**_SMALL, "pad_token_id": 1}),
    _transformer("distilbert", "DistilBertModel", "DistilBertConfig", vocab_size=100, dim=32, n_layers=2, n_heads=4,
                 hidden_dim=64, max_position_embeddings=64),
    _transformer("albert", "AlbertModel", "AlbertConfig", **_SMALL, embedding_size=16),
    _transformer("electra", "ElectraForSequenceClassification", "ElectraConfig", **_SMALL, embedding_size=16),
    _transformer("deberta-v2", "DebertaV2Model", "DebertaV2Config", **_SMALL, relative_attention=True,
                 pos_att_type=["p2c", "c2p"]),
    _transformer("modernbert", "ModernBertModel", "ModernBertConfig", **_SMALL, pad_token_id=0, bos_token_id=1,
                 eos_token_id=2, cls_token_id=1, sep_token_id=2),
    _transformer("t5-encoder", "T5EncoderModel", "T5Config", vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2,
                 num_heads=4),
    _transformer("t5", "T5Model", "T5Config", "seq2seq", vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2,
                 num_heads=4, use_cache=False),
    _transformer("bart", "BartModel", "BartConfig", "seq2seq", vocab_size=100, d_model=32, encoder_layers=2,
                 decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
                 decoder_ffn_dim=64, max_position_embeddings=64, use_cache=False),
    _transformer("gpt2", "GPT2LMHeadModel", "GPT2Config", vocab_size=100, n_embd=32, n_layer=2, n_head=4,
                 n_positions=64, use_cache=False, bos_token_id=1, eos_token_id=2),
    _transformer("gpt-neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", **_SMALL, use_cache=False),
    _transformer("opt", "OPTForCausalLM", "OPTConfig", vocab_size=100, hidden_size=32, num_hidden_layers=2, ffn_dim=64,
                 num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32, use_cache=False),
    _transformer("bloom", "BloomForCausalLM", "BloomConfig", vocab_size=100, hidden_size=32, n_layer=2, n_head=4,
                 use_cache=False),
    _transformer("llama", "LlamaForCausalLM", "LlamaConfig", **_CAUSAL),
    _transformer("qwen2", "Qwen2ForCausalLM", "Qwen2Config", **_CAUSAL),
    _transformer("qwen3", "Qwen3ForCausalLM", "Qwen3Config", **_CAUSAL, head_dim=8),
    _transformer("gemma2", "Gemma2ForCausalLM", "Gemma2Config", **_CAUSAL, head_dim=8),
    _transformer("phi3", "Phi3ForCausalLM", "Phi3Config", **_CAUSAL),
    _transformer("mixtral", "MixtralForCausalLM", "MixtralConfig", **_CAUSAL, num_local_experts=4),
    _transformer("vit", "ViTForImageClassification", "ViTConfig", "image", **_VISION),
    _transformer("dinov2", "Dinov2Model", "Dinov2Config", "image", **_VISION),
    _transformer("convnext", "ConvNextModel", "ConvNextConfig", "image", hidden_sizes=[8, 16, 24, 32],
                 depths=[1, 1, 1, 1], image_size=64),
    _transformer("segformer", "SegformerForSemanticSegmentation", "SegformerConfig", "image", depths=[1, 1, 1, 1],
                 hidden_sizes=[8, 16, 32, 64], num_attention_heads=[1, 1, 2, 4], decoder_hidden_size=32, image_size=64),
    _transformer("clip", "CLIPModel", "CLIPConfig", "image+text", projection_dim=16, text_config=_CLIP_TEXT,
                 vision_config={**_VISION, "projection_dim": 16}, image_size=64),
    _transformer("wav2vec2", "Wav2Vec2Model", "Wav2Vec2Config", "audio", vocab_size=32, hidden_size=32,
                 num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, conv_dim=[16] * 7,
                 num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4),
    _transformer("yolos", "YolosForObjectDetection", "YolosConfig", "image", **{**_VISION, "image_size": [64, 64]},
                 num_detection_tokens=5, initializer_range=0.2),
)  # fmt: skip
