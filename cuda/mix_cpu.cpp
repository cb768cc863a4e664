// What RWKV-6 computes between its matrix products, on CPUs: forward and backward, each in one pass over memory.
//
//     lerp          out_i = x + (previous - x) m_i,  m_i = maa_i (+ offset_i)       previous: the token before, or `last`
//     norm_gate     out = (normalized y * weight + bias) silu(g)                    normalized within each head
//     sigmoid_gate  out = sigmoid(r) v
//     relu_square   out = max(x, 0)^2
//     cross_entropy loss = log sum exp(logits) - logits[target], and its gradient in the logits' place
//
// Tensors are contiguous, of one type, float or bfloat16; sums are taken in float. Rows are tokens. The loops are plain,
// for the compiler to vectorize; the library is compiled for one instruction set.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bfloat16.h"

namespace {

constexpr int64_t kBlock = 256;               // channels handled at a time: their floats stay in the first-level cache
constexpr int64_t kWorkForThreads = 1 << 15;  // elements below which waking a thread costs more than it saves

// exp(x) for x in [-87, 87], beyond which x counts as the bound, to about one unit in the last place: 2^n e^f with
// |f| <= ln 2 / 2, where e^f is a minimax polynomial.
inline float bounded_exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 87.0f ? 87.0f : x;         // both bounds let a NaN through
    const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves no room for a fraction
    const float shifted = x * 1.44269504088896341f + kRound;
    const float n = shifted - kRound;
    const float f = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
    float p = f * 1.38145e-3f + 8.36875e-3f;
    p = p * f + 4.166839e-2f;
    p = p * f + 1.666652e-1f;
    p = p * f + 0.49999993f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, 4);  // its low bits hold n
    bits = (bits + 127u) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + bounded_exp(-x)); }

// work(begin, end, thread) over [0, count), split among threads.
template <class Work>
void parallel(int64_t count, int64_t elements, int threads, const Work& work) {
    if (elements < kWorkForThreads) threads = 1;
    threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, count)));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
        work(count * i / n, count * (i + 1) / n, static_cast<int>(i));
    }
}

// Adds the threads' rows of sums, each `width` long, into `to`.
void add_up(float* to, const std::vector<float>& sums, int64_t width) {
    std::fill(to, to + width, 0.0f);
    for (size_t i = 0; i < sums.size(); i += width)
        for (int64_t c = 0; c < width; c++) to[c] += sums[i + c];
}

// Where each row's sequence begins: sequences of `length` rows, or those that cu_seqlens bounds.
struct Sequences {
    int64_t tokens, length, count;
    const int64_t* cu_seqlens;

    // Bounds that make no sense are refused elsewhere; here they must only not lead out of the tensors.
    int64_t of(int64_t t) const {
        if (!cu_seqlens) return t / length;
        const int64_t above = std::upper_bound(cu_seqlens, cu_seqlens + count, t) - cu_seqlens;
        return std::max<int64_t>(above - 1, 0);
    }
    int64_t start(int64_t sequence) const {
        return cu_seqlens ? std::max<int64_t>(cu_seqlens[sequence], 0) : sequence * length;
    }
};

// x, out (tokens, channels); last (sequences, channels) or null for zeros; maa (n, channels); offsets (n, tokens, channels).
template <class E>
struct Lerp {
    const E *x, *last, *maa, *offsets;
    Sequences sequences;
    int64_t channels;

    // The row before t, or null for zeros.
    const E* previous(int64_t t, int64_t sequence) const {
        if (t > sequences.start(sequence)) return x + (t - 1) * channels;
        return last ? last + sequence * channels : nullptr;
    }

    // delta = previous - x for some channels of a row, as floats; begin is the first.
    void load(int64_t t, const E* before, int64_t begin, int64_t size, float* here, float* delta) const {
        const E* row = x + t * channels + begin;
        for (int64_t c = 0; c < size; c++) here[c] = to_float(row[c]);
        if (before)
            for (int64_t c = 0; c < size; c++) delta[c] = to_float(before[begin + c]) - here[c];
        else
            for (int64_t c = 0; c < size; c++) delta[c] = -here[c];
    }

    // m_i for some channels of row t.
    void weights(int i, int64_t t, int64_t begin, int64_t size, float* m) const {
        const E* base = maa + i * channels + begin;
        for (int64_t c = 0; c < size; c++) m[c] = to_float(base[c]);
        if (!offsets) return;
        const E* offset = offsets + (i * sequences.tokens + t) * channels + begin;
        for (int64_t c = 0; c < size; c++) m[c] += to_float(offset[c]);
    }

    void forward(E* const* outs, int n, int threads) const {
        parallel(sequences.tokens, sequences.tokens * channels * n, threads, [&](int64_t first, int64_t end, int) {
            float here[kBlock], delta[kBlock], m[kBlock];
            for (int64_t t = first; t < end; t++) {
                const E* before = previous(t, sequences.of(t));
                for (int64_t begin = 0; begin < channels; begin += kBlock) {
                    const int64_t size = std::min(kBlock, channels - begin);
                    load(t, before, begin, size, here, delta);
                    for (int i = 0; i < n; i++) {
                        weights(i, t, begin, size, m);
                        E* out = outs[i] + t * channels + begin;
                        for (int64_t c = 0; c < size; c++) out[c] = from_float<E>(here[c] + delta[c] * m[c]);
                    }
                }
            }
        });
    }

    // What row t gives to the row before it, for some channels: sum_i g_i m_i; whole is sum_i g_i.
    void to_previous(const E* const* grads, int n, int64_t t, int64_t begin, int64_t size, float* shifted, float* whole) const {
        float m[kBlock];
        for (int64_t c = 0; c < size; c++) shifted[c] = whole[c] = 0.0f;
        for (int i = 0; i < n; i++) {
            weights(i, t, begin, size, m);
            const E* grad = grads[i] + t * channels + begin;
            for (int64_t c = 0; c < size; c++) {
                const float g = to_float(grad[c]);
                whole[c] += g;
                shifted[c] += g * m[c];
            }
        }
    }

    // Rows run backward, so that what a row gives to the one before it is at hand when that one's turn comes. gmaa is
    // float; gx, glast (all sequences), gmaa, goffsets may each be null.
    void backward(const E* const* grads, int n, E* gx, E* glast, float* gmaa, E* goffsets, int threads) const {
        const int64_t C = channels, width = n * C;
        std::vector<float> sums(gmaa ? width * std::max(1, threads) : 0, 0.0f);
        parallel(sequences.tokens, sequences.tokens * C * n, threads, [&](int64_t first, int64_t end, int thread) {
            std::vector<float> carried(C, 0.0f);
            float here[kBlock], delta[kBlock], shifted[kBlock], whole[kBlock];
            if (first < end && end < sequences.tokens && sequences.start(sequences.of(end)) < end)
                for (int64_t begin = 0; begin < C; begin += kBlock)
                    to_previous(grads, n, end, begin, std::min(kBlock, C - begin), carried.data() + begin, whole);
            for (int64_t t = end - 1; t >= first; t--) {
                const int64_t sequence = sequences.of(t);
                const bool starts = t == sequences.start(sequence);
                const E* before = previous(t, sequence);
                for (int64_t begin = 0; begin < C; begin += kBlock) {
                    const int64_t size = std::min(kBlock, C - begin);
                    float* carry = carried.data() + begin;
                    to_previous(grads, n, t, begin, size, shifted, whole);
                    if (gx)
                        for (int64_t c = 0; c < size; c++)
                            gx[t * C + begin + c] = from_float<E>(whole[c] - shifted[c] + carry[c]);
                    if (starts && glast)
                        for (int64_t c = 0; c < size; c++) glast[sequence * C + begin + c] = from_float<E>(shifted[c]);
                    for (int64_t c = 0; c < size; c++) carry[c] = starts ? 0.0f : shifted[c];
                    if (!gmaa && !goffsets) continue;
                    load(t, before, begin, size, here, delta);
                    for (int i = 0; i < n; i++) {
                        const E* grad = grads[i] + t * C + begin;
                        for (int64_t c = 0; c < size; c++) shifted[c] = to_float(grad[c]) * delta[c];
                        if (goffsets) {
                            E* to = goffsets + (i * sequences.tokens + t) * C + begin;
                            for (int64_t c = 0; c < size; c++) to[c] = from_float<E>(shifted[c]);
                        }
                        if (gmaa) {
                            float* sum = sums.data() + thread * width + i * C + begin;
                            for (int64_t c = 0; c < size; c++) sum[c] += shifted[c];
                        }
                    }
                }
            }
        });
        if (gmaa) add_up(gmaa, sums, width);
    }
};

// y, g, out (tokens, heads * size), weight, bias (heads * size).
template <class E>
struct NormGate {
    const E *y, *g, *weight, *bias;
    int64_t tokens, heads, size;
    float eps;

    // One head's normalized values (from position p of the tensors on); -> 1 / deviation.
    float normalize(int64_t p, float* normal) const {
        float sum = 0.0f, squares = 0.0f;
        for (int64_t c = 0; c < size; c++) normal[c] = to_float(y[p + c]);
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < size; c++) sum += normal[c];
        const float mean = sum / size;
        for (int64_t c = 0; c < size; c++) normal[c] -= mean;
#pragma omp simd reduction(+ : squares)
        for (int64_t c = 0; c < size; c++) squares += normal[c] * normal[c];
        const float scale = 1.0f / __builtin_sqrtf(squares / size + eps);
        for (int64_t c = 0; c < size; c++) normal[c] *= scale;
        return scale;
    }

    void forward(E* out, int threads) const {
        const int64_t width = heads * size;
        parallel(tokens, tokens * width, threads, [&](int64_t first, int64_t end, int) {
            std::vector<float> normal(size);
            for (int64_t t = first; t < end; t++)
                for (int64_t h = 0; h < width; h += size) {
                    const int64_t p = t * width + h;
                    float* z = normal.data();
                    normalize(p, z);
                    for (int64_t c = 0; c < size; c++) {
                        const float gate = to_float(g[p + c]);
                        const float affine = z[c] * to_float(weight[h + c]) + to_float(bias[h + c]);
                        out[p + c] = from_float<E>(affine * gate * sigmoid(gate));
                    }
                }
        });
    }

    // gweight and gbias are float, and both null or neither.
    void backward(const E* grad, E* gy, E* gg, float* gweight, float* gbias, int threads) const {
        const int64_t width = heads * size;
        std::vector<float> weight_sums(gweight ? width * std::max(1, threads) : 0, 0.0f), bias_sums(weight_sums);
        parallel(tokens, tokens * width, threads, [&](int64_t first, int64_t end, int thread) {
            std::vector<float> normal(size), inner(size);
            float *z = normal.data(), *d = inner.data();
            for (int64_t t = first; t < end; t++)
                for (int64_t h = 0; h < width; h += size) {
                    const int64_t p = t * width + h;
                    const float scale = normalize(p, z);
                    for (int64_t c = 0; c < size; c++) {
                        const float gate = to_float(g[p + c]), s = sigmoid(gate), dout = to_float(grad[p + c]);
                        const float affine = z[c] * to_float(weight[h + c]) + to_float(bias[h + c]);
                        gg[p + c] = from_float<E>(dout * affine * s * (1.0f + gate * (1.0f - s)));
                        d[c] = dout * gate * s;
                    }
                    if (gweight) {
                        float *w = weight_sums.data() + thread * width + h, *b = bias_sums.data() + thread * width + h;
                        for (int64_t c = 0; c < size; c++) w[c] += d[c] * z[c], b[c] += d[c];
                    }
                    float mean = 0.0f, along = 0.0f;
                    for (int64_t c = 0; c < size; c++) d[c] *= to_float(weight[h + c]);
#pragma omp simd reduction(+ : mean, along)
                    for (int64_t c = 0; c < size; c++) mean += d[c], along += d[c] * z[c];
                    mean /= size, along /= size;
                    for (int64_t c = 0; c < size; c++) gy[p + c] = from_float<E>(scale * (d[c] - mean - z[c] * along));
                }
        });
        if (gweight) add_up(gweight, weight_sums, width), add_up(gbias, bias_sums, width);
    }
};

template <class E>
void sigmoid_gate_forward(const E* r, const E* v, E* out, int64_t count, int threads) {
    parallel(count, count, threads, [=](int64_t first, int64_t end, int) {
        for (int64_t i = first; i < end; i++) out[i] = from_float<E>(sigmoid(to_float(r[i])) * to_float(v[i]));
    });
}

template <class E>
void sigmoid_gate_backward(const E* r, const E* v, const E* grad, E* gr, E* gv, int64_t count, int threads) {
    parallel(count, count, threads, [=](int64_t first, int64_t end, int) {
        for (int64_t i = first; i < end; i++) {
            const float s = sigmoid(to_float(r[i])), g = to_float(grad[i]);
            gv[i] = from_float<E>(g * s);
            gr[i] = from_float<E>(g * to_float(v[i]) * s * (1.0f - s));
        }
    });
}

template <class E>
void relu_square_forward(const E* x, E* out, int64_t count, int threads) {
    parallel(count, count, threads, [=](int64_t first, int64_t end, int) {
        for (int64_t i = first; i < end; i++) {
            const float a = to_float(x[i]), positive = a < 0.0f ? 0.0f : a;
            out[i] = from_float<E>(positive * positive);
        }
    });
}

template <class E>
void relu_square_backward(const E* x, const E* grad, E* gx, int64_t count, int threads) {
    parallel(count, count, threads, [=](int64_t first, int64_t end, int) {
        for (int64_t i = first; i < end; i++) {
            const float a = to_float(x[i]), positive = a < 0.0f ? 0.0f : a;
            gx[i] = from_float<E>(2.0f * positive * to_float(grad[i]));
        }
    });
}

// Each row of logits gives its loss; where `gradient`, it becomes scale times the loss's gradient, plus scale * pull * (its
// largest logit) at its largest logit.
template <class E>
void cross_entropy(E* logits, const int64_t* targets, float* losses, int64_t rows, int64_t vocabulary, float scale, float pull,
                   bool gradient, int threads) {
    parallel(rows, rows * vocabulary, threads, [=](int64_t first, int64_t end, int) {
        for (int64_t row = first; row < end; row++) {
            E* x = logits + row * vocabulary;
            float largest = to_float(x[0]);
            int64_t block_of_largest = 0;
            for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
                const int64_t stop = std::min(begin + kBlock, vocabulary);
                float most = largest;
#pragma omp simd reduction(max : most)
                for (int64_t i = begin; i < stop; i++) most = std::max(most, to_float(x[i]));
                if (most > largest) largest = most, block_of_largest = begin;
            }
            int64_t where = block_of_largest;
            while (where < vocabulary - 1 && to_float(x[where]) != largest) where++;
            double sum = 0.0;  // of float sums of blocks: a vocabulary's worth of floats would lose a digit
            for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
                const int64_t stop = std::min(begin + kBlock, vocabulary);
                float part = 0.0f;
#pragma omp simd reduction(+ : part)
                for (int64_t i = begin; i < stop; i++) part += bounded_exp(to_float(x[i]) - largest);
                sum += part;
            }
            const int64_t target = targets[row];
            losses[row] = __builtin_logf(static_cast<float>(sum)) + (largest - to_float(x[target]));
            if (!gradient) continue;
            const float factor = static_cast<float>(scale / sum);
            const float at_target = bounded_exp(to_float(x[target]) - largest) * factor - scale;
            for (int64_t i = 0; i < vocabulary; i++) x[i] = from_float<E>(bounded_exp(to_float(x[i]) - largest) * factor);
            x[target] = from_float<E>(at_target);
            const float at_largest = where == target ? at_target : factor;  // exp(0) is 1
            x[where] = from_float<E>(at_largest + scale * pull * largest);
        }
    });
}

template <class E>
const E* in(const void* p) { return static_cast<const E*>(p); }
template <class E>
E* out(void* p) { return static_cast<E*>(p); }

template <class E>
Lerp<E> lerp(const void* x, const void* last, const void* maa, const void* offsets, int64_t tokens, int64_t channels,
             int64_t sequences, const int64_t* cu_seqlens) {
    return {in<E>(x), in<E>(last), in<E>(maa), in<E>(offsets), {tokens, tokens / sequences, sequences, cu_seqlens}, channels};
}

}  // namespace

#define BY_TYPE(call)            \
    if (bfloat16) {              \
        using E = Bfloat16;      \
        call;                    \
    } else {                     \
        using E = float;         \
        call;                    \
    }

extern "C" {

void mix_lerp_forward(const void* x, const void* last, const void* maa, const void* offsets, void* const* outs, int n,
                      int64_t tokens, int64_t channels, int64_t sequences, const int64_t* cu_seqlens, int bfloat16,
                      int threads) {
    BY_TYPE(lerp<E>(x, last, maa, offsets, tokens, channels, sequences, cu_seqlens)
                .forward(reinterpret_cast<E* const*>(outs), n, threads))
}

void mix_lerp_backward(const void* x, const void* last, const void* maa, const void* offsets, const void* const* grads,
                       void* gx, void* glast, float* gmaa, void* goffsets, int n, int64_t tokens, int64_t channels,
                       int64_t sequences, const int64_t* cu_seqlens, int bfloat16, int threads) {
    BY_TYPE(lerp<E>(x, last, maa, offsets, tokens, channels, sequences, cu_seqlens)
                .backward(reinterpret_cast<const E* const*>(grads), n, out<E>(gx), out<E>(glast), gmaa, out<E>(goffsets),
                          threads))
}

void mix_norm_gate_forward(const void* y, const void* g, const void* weight, const void* bias, void* to, int64_t tokens,
                           int64_t heads, int64_t size, float eps, int bfloat16, int threads) {
    BY_TYPE((NormGate<E>{in<E>(y), in<E>(g), in<E>(weight), in<E>(bias), tokens, heads, size, eps})
                .forward(out<E>(to), threads))
}

void mix_norm_gate_backward(const void* y, const void* g, const void* weight, const void* bias, const void* grad, void* gy,
                            void* gg, float* gweight, float* gbias, int64_t tokens, int64_t heads, int64_t size, float eps,
                            int bfloat16, int threads) {
    BY_TYPE((NormGate<E>{in<E>(y), in<E>(g), in<E>(weight), in<E>(bias), tokens, heads, size, eps})
                .backward(in<E>(grad), out<E>(gy), out<E>(gg), gweight, gbias, threads))
}

void mix_sigmoid_gate_forward(const void* r, const void* v, void* to, int64_t count, int bfloat16, int threads) {
    BY_TYPE(sigmoid_gate_forward(in<E>(r), in<E>(v), out<E>(to), count, threads))
}

void mix_sigmoid_gate_backward(const void* r, const void* v, const void* grad, void* gr, void* gv, int64_t count,
                               int bfloat16, int threads) {
    BY_TYPE(sigmoid_gate_backward(in<E>(r), in<E>(v), in<E>(grad), out<E>(gr), out<E>(gv), count, threads))
}

void mix_relu_square_forward(const void* x, void* to, int64_t count, int bfloat16, int threads) {
    BY_TYPE(relu_square_forward(in<E>(x), out<E>(to), count, threads))
}

void mix_relu_square_backward(const void* x, const void* grad, void* gx, int64_t count, int bfloat16, int threads) {
    BY_TYPE(relu_square_backward(in<E>(x), in<E>(grad), out<E>(gx), count, threads))
}

void mix_cross_entropy(void* logits, const int64_t* targets, float* losses, int64_t rows, int64_t vocabulary, float scale,
                       float pull, int gradient, int bfloat16, int threads) {
    BY_TYPE(cross_entropy(out<E>(logits), targets, losses, rows, vocabulary, scale, pull, gradient != 0, threads))
}
}
