/* A replay of a CUDA graph between its copies, in one call: see trt/replay.py. */
#include <stddef.h>
#include <stdint.h>

/* The functions of CUDA's driver that it takes, by address: no header and no library of CUDA's is needed. */
typedef struct {
    int (*wait)(void *stream, void *event, unsigned flags);                        /* cuStreamWaitEvent */
    int (*copy)(uint64_t target, uint64_t source, size_t size_bytes, void *stream); /* cuMemcpyDtoDAsync_v2 */
    int (*launch)(void *graph, void *stream);                                      /* cuGraphLaunch */
    int (*record)(void *event, void *stream);                                      /* cuEventRecord */
} driver;

typedef struct {
    const driver *cuda;
    void *done;  /* the event that stands for the context's work */
    void *graph; /* executable */
    int64_t inputs;
    int64_t count;          /* of inputs and outputs together; 0 where the graph runs at the caller's addresses */
    const uint64_t *inside; /* addresses in the graph */
    const size_t *sizes;    /* in bytes */
} replay;

enum { WAIT, COPY_IN, LAUNCH, COPY_OUT, RECORD }; /* names in trt/replay.py */

static int copies(const replay *self, int64_t from, int64_t to, const uint64_t *outside, void *stream, int inwards)
{
    for (int64_t i = from; i < to; i++) {
        uint64_t in = self->inside[i], out = outside[i];
        int code = self->sizes[i] ? self->cuda->copy(inwards ? in : out, inwards ? out : in, self->sizes[i], stream) : 0;
        if (code)
            return code;
    }
    return 0;
}

/* What lanes.replay_in_steps does. `step` says where the code that is returned, not 0, comes from. */
int trtforge_replay(const replay *self, const uint64_t *outside, void *stream, int *step)
{
    int code = self->cuda->wait(stream, self->done, 0);
    *step = WAIT;
    if (code)
        return code;
    *step = COPY_IN;
    code = copies(self, 0, self->inputs, outside, stream, 1);
    if (!code) {
        *step = LAUNCH;
        code = self->cuda->launch(self->graph, stream);
    }
    if (!code) {
        *step = COPY_OUT;
        code = copies(self, self->inputs, self->count, outside, stream, 0);
    }
    /* Whatever failed: what was put on the stream is the context's work. */
    int recorded = self->cuda->record(self->done, stream);
    if (code || !recorded)
        return code;
    *step = RECORD;
    return recorded;
}
