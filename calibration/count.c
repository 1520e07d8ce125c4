/* The inner loop of calibration: the largest |x|, and counts of |x| by bins of equal width. See count.py. */
#include <stdint.h>
#include <string.h>

#define BINS 2048
#define BLOCK 1024 /* elements whose codes stay in the first-level cache */
#define TABLES 4   /* neighbours are counted apart: incrementing one bin twice in a row waits for the store */

/* One build serves every machine: of the vectorised loop there are two, and the loader takes the one for its CPU. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define BY_CPU __attribute__((target_clones("avx2", "default")))
#endif
#endif
#ifndef BY_CPU
#define BY_CPU
#endif

static uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Codes of a block, and the bits of its largest |x|; codes mean nothing where that is beyond the last bin. */
BY_CPU static uint32_t encode(const float *restrict x, int n, float scale, uint16_t *restrict codes)
{
    uint32_t top = 0;
    for (int i = 0; i < n; i++) {
        uint32_t magnitude = bits_of(x[i]) & 0x7fffffffu;
        top = magnitude > top ? magnitude : top;
        codes[i] = (uint16_t)(int32_t)(__builtin_fabsf(x[i]) * scale);
    }
    return top;
}

/* Counts x[0], x[1], ... as long as every |x| in a block has bits below `limit`, and stops before the first other block.
 * At most 2**32 - 1 elements at a time. Returns how many it has counted; *peak becomes the bits of the largest |x| of
 * those, where that is larger. */
long trtforge_count(const float *x, long n, float scale, uint32_t limit, int64_t *counts, uint32_t *peak)
{
    uint32_t tables[TABLES][BINS];
    uint16_t codes[BLOCK];
    long done = 0;

    memset(tables, 0, sizeof tables);
    while (done < n) {
        long size = n - done < BLOCK ? n - done : BLOCK;
        uint32_t top = encode(x + done, (int)size, scale, codes);
        if (top >= limit)
            break;
        *peak = top > *peak ? top : *peak;
        long i = 0;
        for (; i + TABLES <= size; i += TABLES) {
            uint64_t four; /* one load for four codes */
            memcpy(&four, codes + i, sizeof four);
            tables[0][four & 0xffff]++;
            tables[1][four >> 16 & 0xffff]++;
            tables[2][four >> 32 & 0xffff]++;
            tables[3][four >> 48]++;
        }
        for (; i < size; i++)
            tables[0][codes[i]]++;
        done += size;
    }
    for (int t = 0; t < TABLES; t++)
        for (int b = 0; b < BINS; b++)
            counts[b] += tables[t][b];
    return done;
}
