/* What Python has no words for: copies that leave the processor's cache alone, and a file's sums (store/checksum.py
   says which, and what for) taken as it is read. A plain copy of more than the cache reads what it is about to write
   over: three passes over memory where two do. Compiled by store/memory.py. */

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define AHEAD 512 /* bytes that are asked for before they are copied */
#define ROWS 256
#define COLUMNS 512
#define GRID (ROWS * COLUMNS * 8)
#define CUT -1 /* the file ends before */

#if defined(__x86_64__) && defined(__linux__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

static void past_the_cache(char *to, const char *from, size_t size) {
#ifdef __SSE2__
    size_t head = -(uintptr_t)to & 15; /* such a store wants an address of sixteens */
    if (head > size) head = size;
    memcpy(to, from, head);
    to += head, from += head, size -= head;
    for (; size >= 128; to += 128, from += 128, size -= 128) {
        __m128i part[8];
        _mm_prefetch(from + AHEAD, _MM_HINT_NTA);
        _mm_prefetch(from + AHEAD + 64, _MM_HINT_NTA);
        for (int i = 0; i < 8; i++) part[i] = _mm_loadu_si128((const __m128i *)from + i);
        for (int i = 0; i < 8; i++) _mm_stream_si128((__m128i *)to + i, part[i]);
    }
#endif
    memcpy(to, from, size);
}

/* Until then other cores, and a GPU, may see what was there before. */
static void all_arrived(void) {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

/* sizes[i] bytes from from[i] to to[i], for i below count; past the cache if all together are more than `cache` bytes */
void copy(char *const *to, const char *const *from, const int64_t *sizes, int64_t count, int64_t cache) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) total += sizes[i];
    for (int64_t i = 0; i < count; i++) {
        if (total > cache)
            past_the_cache(to[i], from[i], sizes[i]);
        else
            memcpy(to[i], from[i], sizes[i]);
    }
    all_arrived();
}

typedef uint64_t word __attribute__((aligned(1), may_alias)); /* tensors begin anywhere in a file */

/* data: `grids` of them; sums: [grids][ROWS + COLUMNS] */
FOR_EACH_PROCESSOR
void sums_of_grids(const word *data, int64_t grids, uint64_t *sums) {
    for (int64_t grid = 0; grid < grids; grid++, sums += ROWS + COLUMNS) {
        uint64_t columns[COLUMNS] = {0};
        for (int row = 0; row < ROWS; row++, data += COLUMNS) {
            uint64_t sum = 0;
            for (int column = 0; column < COLUMNS; column++) {
                sum += data[column];
                columns[column] += data[column];
            }
            sums[row] = sum;
        }
        memcpy(sums + ROWS, columns, sizeof columns);
    }
}

/* A part of a file and the memory that it goes to. */
struct place {
    int64_t begin, end;
    char *to;
};

/* The bytes [start, start + size), which are in `grid`, to the places that want them; returns the first place that may
   want more. Places are sorted and do not overlap. */
static const struct place *hand_out(const uint8_t *grid, int64_t start, int64_t size, const struct place *place,
                                    const struct place *last) {
    while (place < last && place->end <= start) place++;
    for (const struct place *each = place; each < last && each->begin < start + size; each++) {
        int64_t begin = each->begin > start ? each->begin : start;
        int64_t end = each->end < start + size ? each->end : start + size;
        past_the_cache(each->to + (begin - each->begin), (const char *)grid + (begin - start), end - begin);
    }
    return place;
}

/* Of a file's bytes [start, end), read a grid at a time to `grid`, and from there to `count` places.
   0, CUT, or what errno was. */
int sums_of_file(int file, int64_t start, int64_t end, uint8_t *grid, uint64_t *sums, const struct place *places,
                 int64_t count) {
    const struct place *place = places;
    for (; start < end; sums += ROWS + COLUMNS) {
        int64_t size = end - start < GRID ? end - start : GRID;
        for (int64_t done = 0; done < size;) {
            ssize_t got = pread(file, grid + done, size - done, start + done);
            if (got == 0) return CUT;
            if (got > 0)
                done += got;
            else if (errno != EINTR)
                return errno;
        }
        memset(grid + size, 0, GRID - size);
        sums_of_grids((const word *)grid, 1, sums);
        place = hand_out(grid, start, size, place, places + count);
        start += size;
    }
    all_arrived();
    return 0;
}
