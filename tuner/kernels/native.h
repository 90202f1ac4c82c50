/* What the native kernels share: the bits of floats, half precision, threads. */
#ifndef ACCUTUNE_NATIVE_H
#define ACCUTUNE_NATIVE_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

static const int64_t PARALLEL = 1 << 15; /* values below which threads do not pay */

#ifdef __GNUC__
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define PREFETCH(ADDRESS, WRITE) __builtin_prefetch(ADDRESS, WRITE);
#else
#define ALWAYS_INLINE static inline
#define PREFETCH(ADDRESS, WRITE)
#endif

/* Copy past the cache: lines that are wholly written then need not be read first. */
static inline void stream(void *to, const void *from, int64_t bytes) {
    int64_t done = 0;
#ifdef __SSE2__
    if ((uintptr_t)to % sizeof(__m128i) == 0) {
        for (; done + (int64_t)sizeof(__m128i) <= bytes; done += sizeof(__m128i)) {
            const __m128i line = _mm_loadu_si128((const __m128i *)((const char *)from + done));
            _mm_stream_si128((__m128i *)((char *)to + done), line);
        }
    }
#endif
    memcpy((char *)to + done, (const char *)from + done, bytes - done);
}
/* Let other threads see all that was streamed. */
static inline void end_stream(void) {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

static inline uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static inline float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

typedef uint16_t bf16;
static inline float from_bf16(bf16 h) { return float_of((uint32_t)h << 16); }
static inline bf16 to_bf16(float x) {
    uint32_t u = bits_of(x);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    uint32_t top = (u & 0x80000000u) >> 16 | 0x7f7f; /* the largest finite number, signed */
    if ((rounded & 0x7fff) >= 0x7f80) rounded = (u & 0x7fffffff) == 0x7f800000 ? u >> 16 : top;
    return (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}
static inline float same(float x) { return x; }
/* x, or 0: of the bits, because a load that depends on a condition is several times slower. */
static inline float kept(float x, int is_kept) { return float_of(bits_of(x) & -(uint32_t)is_kept); }
static inline bf16 kept_bf16(bf16 x, int is_kept) { return x & (bf16)-is_kept; }
#ifdef __FLT16_MAX__
typedef _Float16 fp16;
static inline float from_fp16(fp16 h) { return (float)h; }
static inline fp16 to_fp16(float x) {
    float finite = x > 65504.0f ? 65504.0f : x;
    finite = finite < -65504.0f ? -65504.0f : finite;
    return (fp16)(fabsf(x) == INFINITY ? x : finite); /* inf is of a format that overflows */
}
static inline fp16 kept_fp16(fp16 x, int is_kept) {
    uint16_t u;
    memcpy(&u, &x, 2);
    u = kept_bf16(u, is_kept);
    memcpy(&x, &u, 2);
    return x;
}
#endif

#define PRAGMA(TEXT) _Pragma(#TEXT)
#define PARALLEL_FOR(VALUES) PRAGMA(omp parallel for schedule(static) if ((VALUES) > PARALLEL))

#endif
