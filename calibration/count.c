/* The inner loop of calibration: the largest |x|, and counts of |x| by bins of equal width. See count.py. */
#include <stdint.h>
#include <string.h>

#define BINS 2048
#define BLOCK 2048 /* floats whose codes and counts stay in the first-level cache */
#define TABLES 4   /* neighbours are counted apart: incrementing one bin twice in a row waits for the store */

static uint32_t largest(const uint32_t *bits, long n)
{
    uint32_t peak = 0;
    for (long i = 0; i < n; i++) {
        uint32_t magnitude = bits[i] & 0x7fffffffu;
        peak = magnitude > peak ? magnitude : peak;
    }
    return peak;
}

/* Counts x[0], x[1], ... as long as every |x| in a block has bits below `limit`, and stops before the first other block.
 * At most 2**32 - 1 elements at a time. Returns how many it has counted; *peak becomes the bits of the largest |x| of those, where that is larger. */
long trtforge_count(const float *x, long n, float scale, uint32_t limit, int64_t *counts, uint32_t *peak)
{
    uint32_t tables[TABLES][BINS];
    uint16_t codes[BLOCK];
    long done = 0;

    memset(tables, 0, sizeof tables);
    while (done < n) {
        const float *block = x + done;
        long size = n - done < BLOCK ? n - done : BLOCK;
        uint32_t bits[BLOCK];
        memcpy(bits, block, (size_t)size * sizeof *bits);
        uint32_t top = largest(bits, size);
        if (top >= limit)
            break;
        *peak = top > *peak ? top : *peak;
        for (long i = 0; i < size; i++)
            codes[i] = (uint16_t)(int32_t)(__builtin_fabsf(block[i]) * scale);
        long i = 0;
        for (; i + TABLES <= size; i += TABLES)
            for (int t = 0; t < TABLES; t++)
                tables[t][codes[i + t]]++;
        for (; i < size; i++)
            tables[0][codes[i]]++;
        done += size;
    }
    for (int t = 0; t < TABLES; t++)
        for (int b = 0; b < BINS; b++)
            counts[b] += tables[t][b];
    return done;
}
