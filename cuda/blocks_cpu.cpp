// What Bone's block affine forms and its sharding compute besides the product with the frozen weight, on CPUs.
//
// x (tokens, in) is cut along its rows into shards x_b of `rank` columns, and `bone` (in / rank, rank, rank) holds a matrix
// B_b for each:
//     affine           z_b = x_b + u_b, shift = sum_b u_b       u_b = x_b B_b^T
//     affine_backward  dx_b = dz_b + du_b B_b, dB_b = du_b^T x_b    du_b = dz_b + sum_a g_a
//     merge            w_ab + w_ab B_a + B_a               for a weight w, blocks a of rows, b of columns
//     shard_sum        sum_b x_b
//     add_tiled        y_a += tile
// Each passes over its large tensors once. A few rows of a shard at a time come into the cache, are multiplied there
// (blocks_plain.h, blocks_amx.h), and leave. Rows of x and g may lie apart by a stride; everything else is contiguous, all
// of one type, float or bfloat16, with sums in float. Gradients of matrices are added up in an order that does not depend
// on the number of threads.
#include <omp.h>

#include <algorithm>
#include <type_traits>

#include "blocks_plain.h"
#if defined(__AMX_BF16__)
#include "blocks_amx.h"
#endif

namespace {

constexpr int64_t kWorkForThreads = 1 << 15;  // elements below which waking a thread costs more than it saves
constexpr int64_t kShortSum = 8;              // tiles whose products are added up in one sum
constexpr int64_t kChunkTiles = 4;            // tiles of rows that stay in the second-level cache

template <class E>
struct Rows {  // (count, width), `stride` elements apart
    E* data;
    int64_t stride;
    E* operator[](int64_t t) const { return data + t * stride; }
};

struct Range {
    int64_t begin, end;
};
inline Range share(int64_t count, int64_t part, int64_t parts) { return {count * part / parts, count * (part + 1) / parts}; }

inline int useful(int threads, int64_t count, int64_t elements) {
    return elements < kWorkForThreads ? 1 : static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, count)));
}

// Some rows of a shard become a tile padded with zeros, plus `given` (floats, as wide as the tile) where it is not null.
template <class Math, class E>
void load_tile(typename Math::Operand* tile, Rows<const E> from, int64_t count, int64_t rank, const float* given = nullptr) {
    const int64_t width = Math::width(rank);
    for (int64_t t = 0; t < count; t++) {
        const E* row = from[t];
        if constexpr (std::is_same<E, typename Math::Operand>::value) {
            if (!given) {
                memcpy(tile + t * width, row, rank * sizeof(E));
                std::fill(tile + t * width + rank, tile + (t + 1) * width, E{});
                continue;
            }
        }
        for (int64_t c = 0; c < width; c += kLanes) {
            const Vec x = c < rank ? load_some(row + c, rank - c) : Vec{};
            store(tile + t * width + c, given ? x + load(given + t * width + c) : x);
        }
    }
}

// Fetches some elements of a row into the second-level cache, in time for their turn. Reaching past a tensor does no harm.
template <class E>
INLINE void fetch(const E* row, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(E)) __builtin_prefetch(row + i, 0, 2);
}
template <class E>
INLINE void fetch_to_write(const E* row, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(E)) __builtin_prefetch(row + i, 1, 2);
}

// Zero rows up to a whole number of Math's blocks, which `outer` sums over.
template <class Math>
void clear_rest(typename Math::Operand* tile, int64_t count, int64_t rank) {
    const int64_t width = Math::width(rank);
    std::fill(tile + count * width, tile + Math::kTile * width, typename Math::Operand{});
}

// total (rank, rank) += sum, which is cleared. Short sums added up lose less than one long sum.
template <class Math>
void add_sum(float* total, float* sum, int64_t rank) {
    const int64_t width = Math::width(rank);
    for (int64_t i = 0; i < rank; i++)
        for (int64_t c = 0; c < rank; c += kLanes) {
            float* to = total + i * rank + c;
            store_some(to, load_some(to, rank - c) + load(sum + i * width + c), rank - c);
        }
    std::fill(sum, sum + width * width, 0.0f);
}

template <class Math, class E>
void affine(Rows<const E> x, const E* bone, E* z, E* shift, int64_t tokens, int64_t in, int64_t rank, int threads) {
    using Operand = typename Math::Operand;
    const int64_t blocks = in / rank, width = Math::width(rank), size = Math::packed_size(rank);
    Scratch<Operand> packed(blocks * size);
#pragma omp parallel num_threads(useful(threads, tokens, tokens * in))
    {
        const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        const Range mine = share(blocks, thread, team);
        for (int64_t b = mine.begin; b < mine.end; b++)
            Math::pack_transposed(packed.data() + b * size, bone + b * rank * rank, rank);
#pragma omp barrier
        Math math(rank);
        Scratch<Operand> tile(Math::kTile * width);
        Scratch<float> product(Math::kTile * width), sums(Math::kTile * width);
        const Range rows = share(tokens, thread, team);
        for (int64_t first = rows.begin; first < rows.end; first += Math::kTile) {
            const int64_t count = std::min(Math::kTile, rows.end - first);
            std::fill(sums.data(), sums.data() + count * width, 0.0f);
            for (int64_t b = 0; b < blocks; b++) {
                load_tile<Math, E>(tile.data(), {x[first] + b * rank, x.stride}, count, rank);
                math.rows(product.data(), tile.data(), packed.data() + b * size, count, [&](int64_t begin, int64_t end) {
                    for (int64_t t = begin; t < end; t++) {
                        E* to = z + (first + t) * in + b * rank;
                        fetch(x[first + t] + (b + 1) * rank, rank);
                        fetch_to_write(to + rank, rank);
                        for (int64_t c = 0; c < rank; c += kLanes) {
                            const int64_t i = t * width + c;
                            const Vec u = load(product.data() + i);
                            store(sums.data() + i, load(sums.data() + i) + u);
                            store_some(to + c, load(tile.data() + i) + u, rank - c);
                        }
                    }
                });
            }
            for (int64_t t = 0; t < count; t++)
                for (int64_t c = 0; c < rank; c += kLanes)
                    store_some(shift + (first + t) * rank + c, load(sums.data() + t * width + c), rank - c);
        }
    }
}

// total (rows, `width` apart) = the sum of a row's shards, the last of which may be short; beyond `rank` it stays as it is.
template <class E>
void sum_shards(float* total, int64_t width, Rows<const E> x, Range rows, int64_t in, int64_t rank) {
    for (int64_t t = rows.begin; t < rows.end; t++) {
        float* sum = total + (t - rows.begin) * width;
        for (int64_t b = 0; b < in; b += rank) {
            const int64_t n = std::min(rank, in - b);
            for (int64_t c = 0; c < n; c += kLanes) {
                const Vec here = load_some(x[t] + b + c, n - c);
                store(sum + c, b ? load(sum + c) + here : here);
            }
        }
    }
}

// d (tokens, in) holds dz and becomes dx. d_bone (float, zeros) may be null, and x with it.
template <class Math, class E>
void affine_backward(E* d, Rows<const E> g, Rows<const E> x, const E* bone, float* d_bone, int64_t tokens, int64_t in, int64_t out,
                     int64_t rank, int threads) {
    using Operand = typename Math::Operand;
    const int64_t blocks = in / rank, width = Math::width(rank), chunk = kChunkTiles * Math::kTile;
    Scratch<float> shift(chunk * width);  // of one chunk's tokens
    std::fill(shift.data(), shift.data() + chunk * width, 0.0f);
#pragma omp parallel num_threads(useful(threads, blocks, tokens * in))
    {
        const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        const Range mine = share(blocks, thread, team);
        Math math(rank);
        Scratch<Operand> packed(Math::packed_size(rank)), du(Math::kTile * width), right(Math::kTile * width);
        Scratch<float> product(Math::kTile * width), sum(width * width);
        std::fill(sum.data(), sum.data() + width * width, 0.0f);
        for (int64_t start = 0; start < tokens; start += chunk) {
            const int64_t stop = std::min(start + chunk, tokens);
            const Range some = share(stop - start, thread, team);
            sum_shards(shift.data() + some.begin * width, width, g, {start + some.begin, start + some.end}, out, rank);
#pragma omp barrier
            for (int64_t b = mine.begin; b < mine.end; b++) {
                Math::pack(packed.data(), bone + b * rank * rank, rank);
                for (int64_t first = start; first < stop; first += Math::kTile) {
                    const int64_t count = std::min(Math::kTile, stop - first);
                    const Rows<E> here{d + first * in + b * rank, in};
                    load_tile<Math, E>(du.data(), {here.data, in}, count, rank, shift.data() + (first - start) * width);
                    if (d_bone) {
                        load_tile<Math, E>(right.data(), {x[first] + b * rank, x.stride}, count, rank);
                        clear_rest<Math>(du.data(), count, rank);
                        clear_rest<Math>(right.data(), count, rank);
                        math.outer(sum.data(), du.data(), right.data(), count);
                    }
                    math.rows(product.data(), du.data(), packed.data(), count, [&](int64_t begin, int64_t end) {
                        for (int64_t t = begin; t < end; t++) {
                            fetch_to_write(here[t] + rank, rank);
                            if (d_bone) fetch(x[first + t] + (b + 1) * rank, rank);
                            for (int64_t c = 0; c < rank; c += kLanes)
                                store_some(here[t] + c, load_some(here[t] + c, rank - c) + load(product.data() + t * width + c), rank - c);
                        }
                    });
                }
                if (d_bone) add_sum<Math>(d_bone + b * rank * rank, sum.data(), rank);
            }
#pragma omp barrier
        }
    }
}

// w, merged (count * rank, in), bone (count, rank, rank): merged = w + w B + B for each block of rows and columns. Where d_bone
// (float, zeros) is not null, merged comes in holding its gradient, from which the gradient of bone is taken first. Blocks of
// one a share a matrix: their rows, in memory's order, are one (rank * in / rank, rank) matrix.
template <class Math, class E>
void merge(const E* w, const E* bone, E* merged, float* d_bone, int64_t count, int64_t in, int64_t rank, int threads) {
    using Operand = typename Math::Operand;
    const int64_t blocks = in / rank, pieces = rank * blocks, width = Math::width(rank);
#pragma omp parallel num_threads(useful(threads, count, count * rank * in))
    {
        Math math(rank);
        Scratch<Operand> packed(Math::packed_size(rank)), tile(Math::kTile * width), d(Math::kTile * width);
        Scratch<float> product(Math::kTile * width), sum(width * width);
        std::fill(sum.data(), sum.data() + width * width, 0.0f);
        const Range mine = share(count, omp_get_thread_num(), omp_get_num_threads());
        for (int64_t a = mine.begin; a < mine.end; a++) {
            const E* matrix = bone + a * rank * rank;
            Math::pack(packed.data(), matrix, rank);
            for (int64_t first = 0; first < pieces; first += Math::kTile) {
                const int64_t size = std::min(Math::kTile, pieces - first);
                const E* from = w + (a * pieces + first) * rank;
                E* to = merged + (a * pieces + first) * rank;
                load_tile<Math, E>(tile.data(), {from, rank}, size, rank);
                if (d_bone) {
                    load_tile<Math, E>(d.data(), {to, rank}, size, rank);
                    clear_rest<Math>(tile.data(), size, rank);
                    clear_rest<Math>(d.data(), size, rank);
                    math.outer(sum.data(), tile.data(), d.data(), size);
                    for (int64_t t = 0, end; t < size; t = end) {  // as many as lie in one row
                        const int64_t row = (first + t) / blocks;
                        end = std::min(size, (row + 1) * blocks - first);
                        for (int64_t c = 0; c < width; c += kLanes) {
                            Vec own = load(sum.data() + row * width + c);
                            for (int64_t i = t; i < end; i++) own += load(d.data() + i * width + c);
                            store(sum.data() + row * width + c, own);
                        }
                    }
                    if ((first / Math::kTile) % kShortSum == kShortSum - 1 || first + size == pieces)
                        add_sum<Math>(d_bone + a * rank * rank, sum.data(), rank);
                }
                math.rows(product.data(), tile.data(), packed.data(), size, [&](int64_t begin, int64_t end) {
                    for (int64_t t = begin; t < end; t++) {
                        const E* row = matrix + (first + t) / blocks * rank;
                        for (int64_t c = 0; c < rank; c += kLanes) {
                            const int64_t i = t * width + c;
                            const Vec affine = load(tile.data() + i) + load(product.data() + i) + load_some(row + c, rank - c);
                            store_some(to + t * rank + c, affine, rank - c);
                        }
                    }
                });
            }
        }
    }
}

template <class E>
void shard_sum(Rows<const E> x, E* total, int64_t tokens, int64_t in, int64_t rank, int threads) {
#pragma omp parallel num_threads(useful(threads, tokens, tokens * in))
    {
        Scratch<float> sum(round_up(rank, kLanes));
        const Range rows = share(tokens, omp_get_thread_num(), omp_get_num_threads());
        for (int64_t t = rows.begin; t < rows.end; t++) {
            std::fill(sum.data(), sum.data() + rank, 0.0f);
            sum_shards(sum.data(), 0, x, {t, t + 1}, in, rank);
            for (int64_t c = 0; c < rank; c += kLanes) store_some(total + t * rank + c, load(sum.data() + c), rank - c);
        }
    }
}

// y (tokens, width) += tile (tokens, rank), repeated along the row and cut at its end.
template <class E>
void add_tiled(E* y, const E* tile, int64_t tokens, int64_t width, int64_t rank, int threads) {
#pragma omp parallel num_threads(useful(threads, tokens, tokens * width))
    {
        const Range rows = share(tokens, omp_get_thread_num(), omp_get_num_threads());
        for (int64_t t = rows.begin; t < rows.end; t++)
            for (int64_t b = 0; b < width; b += rank) {
                const int64_t n = std::min(rank, width - b);
                E* to = y + t * width + b;
                for (int64_t c = 0; c < n; c += kLanes)
                    store_some(to + c, load_some(to + c, n - c) + load_some(tile + t * rank + c, n - c), n - c);
            }
    }
}

#if defined(__AMX_BF16__)
using HalfMath = Amx;

// to (columns, rows) = the transpose of x (rows, columns).
void transpose(Rows<const Bfloat16> x, Bfloat16* to, int64_t rows, int64_t columns, int threads) {
    constexpr int64_t kPanel = 128;  // columns whose lines of `to` are written at one time
    const int64_t panels = (columns + kPanel - 1) / kPanel;
#pragma omp parallel for num_threads(useful(threads, panels, rows * columns)) schedule(static)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t t = 0; t < rows; t += 32)
            for (int64_t c = panel * kPanel; c < std::min((panel + 1) * kPanel, columns); c += 32) {
                for (int64_t i = t + 32; i < std::min(t + 64, rows); i++) fetch(x[i] + c, 32);
                transpose_block(to + c * rows + t, rows, x[t] + c, x.stride, std::min<int64_t>(32, rows - t),
                                std::min<int64_t>(32, columns - c));
            }
}
#else
using HalfMath = Plain;
#endif

}  // namespace

// Calls `call` with E the tensors' type and Math its arithmetic.
#define BY_TYPE(call)              \
    if (bfloat16) {                \
        using E = Bfloat16;        \
        using Math = HalfMath;     \
        (void)sizeof(Math);        \
        call;                      \
    } else {                       \
        using E = float;           \
        using Math = Plain;        \
        (void)sizeof(Math);        \
        call;                      \
    }

template <class E>
static const E* in(const void* p) { return static_cast<const E*>(p); }
template <class E>
static E* out(void* p) { return static_cast<E*>(p); }

extern "C" {

// Whether this library may run here. Linux lends the matrix unit's registers to a process that asks.
int blocks_start() {
#if defined(__AMX_BF16__)
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("avx512bf16") && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return 1;
#endif
}

void blocks_affine(const void* x, int64_t x_stride, const void* bone, void* z, void* shift, int64_t tokens, int64_t in_features,
                   int64_t rank, int bfloat16, int threads) {
    BY_TYPE((affine<Math, E>({in<E>(x), x_stride}, in<E>(bone), out<E>(z), out<E>(shift), tokens, in_features, rank, threads)))
}

void blocks_affine_backward(void* d, const void* g, int64_t g_stride, const void* x, int64_t x_stride, const void* bone, float* d_bone,
                            int64_t tokens, int64_t in_features, int64_t out_features, int64_t rank, int bfloat16, int threads) {
    BY_TYPE((affine_backward<Math, E>(out<E>(d), {in<E>(g), g_stride}, {in<E>(x), x_stride}, in<E>(bone), d_bone, tokens, in_features,
                                      out_features, rank, threads)))
}

void blocks_merge(const void* w, const void* bone, void* merged, float* d_bone, int64_t count, int64_t in_features, int64_t rank,
                  int bfloat16, int threads) {
    BY_TYPE((merge<Math, E>(in<E>(w), in<E>(bone), out<E>(merged), d_bone, count, in_features, rank, threads)))
}

#if defined(__AMX_BF16__)
void blocks_transpose(const void* x, int64_t x_stride, void* to, int64_t rows, int64_t columns, int threads) {
    transpose({in<Bfloat16>(x), x_stride}, out<Bfloat16>(to), rows, columns, threads);
}
#endif

void blocks_shard_sum(const void* x, int64_t x_stride, void* total, int64_t tokens, int64_t in_features, int64_t rank, int bfloat16,
                      int threads) {
    BY_TYPE(shard_sum<E>({in<E>(x), x_stride}, out<E>(total), tokens, in_features, rank, threads))
}

void blocks_add_tiled(void* y, const void* tile, int64_t tokens, int64_t width, int64_t rank, int bfloat16, int threads) {
    BY_TYPE(add_tiled<E>(out<E>(y), in<E>(tile), tokens, width, rank, threads))
}
}
