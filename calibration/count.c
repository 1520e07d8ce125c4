/* The inner loop of calibration: the largest |x|, and counts of |x| by bins of equal width. See count.py. */
#include <stdint.h>
#include <string.h>

#define BINS 2048
#define BLOCK 1024 /* elements whose codes stay in the first-level cache */
#define TABLES 4   /* neighbours are counted apart: incrementing one bin twice in a row waits for the store */
#define LANES 8    /* codes that are packed at once */

typedef struct {
    uint16_t codes[BLOCK]; /* some or all of those that are 0 left out */
    long kept;             /* how many there are */
    uint32_t top;          /* the bits of the largest |x|; codes mean nothing where it is beyond the last bin */
} block;

static uint32_t magnitude(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffffu;
}

static uint16_t code_of(float x, float scale) { return (uint16_t)(int32_t)(__builtin_fabsf(x) * scale); }

static void encode(const float *restrict x, long n, float scale, block *restrict to)
{
    uint32_t top = 0;
    for (long i = 0; i < n; i++) {
        uint32_t bits = magnitude(x[i]);
        top = bits > top ? bits : top;
        to->codes[i] = code_of(x[i], scale);
    }
    to->kept = n;
    to->top = top;
}

/* One build serves every machine: what not every CPU can do is compiled apart, and chosen when it runs. */
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,popcnt")))

static uint8_t places[256][2 * LANES]; /* by mask: the bytes of the lanes that it names, side by side */

__attribute__((constructor)) static void fill_places(void)
{
    for (int mask = 0; mask < 256; mask++)
        for (int lane = 0, next = 0; lane < LANES; lane++)
            if (mask >> lane & 1) {
                places[mask][next++] = (uint8_t)(2 * lane);
                places[mask][next++] = (uint8_t)(2 * lane + 1);
            }
}

AVX2 static uint16_t *pack(__m128i codes, unsigned mask, uint16_t *to)
{
    __m128i order = _mm_loadu_si128((const __m128i *)places[mask]);
    _mm_storeu_si128((__m128i *)to, _mm_shuffle_epi8(codes, order));
    return to + __builtin_popcount(mask);
}

/* The last elements, from the i-th on, one by one; codes up to `next` are there, and `top` of the others. */
static void encode_rest(const float *x, long i, long n, float scale, uint16_t *next, uint32_t top, block *to)
{
    for (; i < n; i++) {
        uint32_t bits = magnitude(x[i]);
        top = bits > top ? bits : top;
        *next++ = code_of(x[i], scale);
    }
    to->kept = next - to->codes;
    to->top = top;
}

/* As `encode`, without the zeros: they are half of all after ReLU, and counting is what takes the time. */
AVX2 static void encode_avx2(const float *restrict x, long n, float scale, block *restrict to)
{
    const __m256i absolute = _mm256_set1_epi32(0x7fffffff), zero = _mm256_setzero_si256();
    const __m256 factor = _mm256_set1_ps(scale);
    __m256i most = zero;
    uint16_t *next = to->codes;
    long i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        _mm_prefetch((const char *)(x + i + BLOCK), _MM_HINT_T0); /* arrives while codes are counted */
        __m256i a = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(x + i)), absolute);
        __m256i b = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(x + i + LANES)), absolute);
        most = _mm256_max_epu32(most, _mm256_max_epu32(a, b));
        a = _mm256_cvttps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(a), factor));
        b = _mm256_cvttps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(b), factor));
        __m256i codes = _mm256_packs_epi32(a, b); /* in another order */
        __m256i empty = _mm256_cmpeq_epi16(codes, zero);
        __m128i low = _mm256_castsi256_si128(empty), high = _mm256_extracti128_si256(empty, 1);
        unsigned mask = ~(unsigned)_mm_movemask_epi8(_mm_packs_epi16(low, high));
        next = pack(_mm256_castsi256_si128(codes), mask & 0xff, next);
        next = pack(_mm256_extracti128_si256(codes, 1), mask >> 8 & 0xff, next);
    }
    uint32_t tops[LANES], top = 0;
    _mm256_storeu_si256((__m256i *)tops, most);
    for (int lane = 0; lane < LANES; lane++)
        top = tops[lane] > top ? tops[lane] : top;
    encode_rest(x, i, n, scale, next, top, to);
}

#if __GNUC__ >= 8 || defined(__clang__)
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vbmi2,popcnt")))
#define WIDE 16 /* elements of a vector */

/* As `encode_avx2`: an instruction packs what there a table does. It packs in a register, since Zen 4 takes a hundred
 * cycles to pack to memory. */
AVX512 static void encode_avx512(const float *restrict x, long n, float scale, block *restrict to)
{
    const __m512i absolute = _mm512_set1_epi32(0x7fffffff);
    const __m512 factor = _mm512_set1_ps(scale);
    __m512i most = _mm512_setzero_si512();
    uint16_t *next = to->codes;
    long i = 0;
    for (; i + 2 * WIDE <= n; i += 2 * WIDE) {
        _mm_prefetch((const char *)(x + i + BLOCK), _MM_HINT_T0);
        _mm_prefetch((const char *)(x + i + BLOCK + WIDE), _MM_HINT_T0);
        __m512i a = _mm512_and_si512(_mm512_loadu_si512(x + i), absolute);
        __m512i b = _mm512_and_si512(_mm512_loadu_si512(x + i + WIDE), absolute);
        most = _mm512_max_epu32(most, _mm512_max_epu32(a, b));
        a = _mm512_cvttps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(a), factor));
        b = _mm512_cvttps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(b), factor));
        __m512i codes = _mm512_packs_epi32(a, b);
        __mmask32 filled = _mm512_test_epi16_mask(codes, codes);
        _mm512_storeu_si512(next, _mm512_maskz_compress_epi16(filled, codes));
        next += __builtin_popcount(filled);
    }
    encode_rest(x, i, n, scale, next, _mm512_reduce_max_epu32(most), to);
}
#define CAN_AVX512 (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi2"))
#else
#define CAN_AVX512 0
#define encode_avx512 encode_avx2
#endif
#define ENCODE_HERE (CAN_AVX512 ? encode_avx512 : __builtin_cpu_supports("avx2") ? encode_avx2 : encode)
#else
#define ENCODE_HERE encode
#endif
#ifndef ENCODE /* a test asks for the one that this machine does not take */
#define ENCODE ENCODE_HERE
#endif

typedef struct {
    const float *x;
    int64_t size;    /* 2**32 - 1 at most */
    int64_t *counts; /* of BINS; changed */
    float scale;     /* 1 / the width of a bin */
    uint32_t limit;  /* the bits of the smallest |x| that is too large */
    uint32_t peak;   /* changed: the bits of the largest |x| counted, where that is larger */
    uint32_t beyond; /* set: the bits of the largest |x| of the others */
    int64_t done;    /* set: how many were counted */
} job;

/* Counts x[0], x[1], ... as long as every |x| in a block has bits below the limit, and stops before the first other
 * block. */
static void count(job *of)
{
    void (*const encode_block)(const float *restrict, long, float, block *restrict) = ENCODE;
    uint32_t tables[TABLES][BINS];
    block found;

    memset(tables, 0, sizeof tables);
    of->done = 0;
    while (of->done < of->size) {
        long size = of->size - of->done < BLOCK ? (long)(of->size - of->done) : BLOCK;
        encode_block(of->x + of->done, size, of->scale, &found);
        if (found.top >= of->limit)
            break;
        of->peak = found.top > of->peak ? found.top : of->peak;
        of->counts[0] += size - found.kept;
        long i = 0;
        for (; i + TABLES <= found.kept; i += TABLES) {
            uint64_t four; /* one load for four codes */
            memcpy(&four, found.codes + i, sizeof four);
            tables[0][four & 0xffff]++;
            tables[1][four >> 16 & 0xffff]++;
            tables[2][four >> 32 & 0xffff]++;
            tables[3][four >> 48]++;
        }
        for (; i < found.kept; i++)
            tables[0][found.codes[i]]++;
        of->done += size;
    }
    for (int t = 0; t < TABLES; t++)
        for (int b = 0; b < BINS; b++)
            of->counts[b] += tables[t][b];
    of->beyond = 0;
    for (int64_t i = of->done; i < of->size; i += BLOCK) {
        encode_block(of->x + i, of->size - i < BLOCK ? (long)(of->size - i) : BLOCK, of->scale, &found);
        of->beyond = found.top > of->beyond ? found.top : of->beyond;
    }
}

/* All in one call: between two calls a thread waits for the interpreter. */
void trtforge_count_jobs(job *jobs, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        count(&jobs[i]);
}
