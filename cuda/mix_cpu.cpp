// What RWKV-6 computes between its matrix products, on CPUs: forward and backward, each in one pass over memory.
//
//     lerp          out_i = x + (previous - x) m_i,  m_i = maa_i (+ low_i up_i)     previous: the token before, or `last`
//     norm_gate     out = (normalized y * weight + bias) silu(g)                    normalized within each head
//     sigmoid_gate  out = sigmoid(r) v
//     relu_square   out = max(x, 0)^2
//     cross_entropy loss = log sum exp(logits) - logits[target], and its gradient in the logits' place
//
// Tensors are contiguous, of one type, float or bfloat16; sums are taken in float. Rows are tokens. The loops are plain,
// for the compiler to vectorize; the library is compiled for one instruction set.
#include "mix_lerp.h"

namespace {

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

// A tensor's elements as floats: where they lie, if they are floats already, else converted into `copy`.
const float* as_floats(const float* p, int64_t, std::vector<float>&) { return p; }
const float* as_floats(const Bfloat16* p, int64_t count, std::vector<float>& copy) {
    copy.resize(count);
    for (int64_t i = 0; i < count; i++) copy[i] = to_float(p[i]);
    return copy.data();
}

template <class E>
Lerp<E> lerp(const void* x, const void* last, const void* maa, const void* low, const void* up, std::vector<float>& floats,
             int n, int64_t tokens, int64_t channels, int64_t rank, int64_t sequences, const int64_t* cu_seqlens) {
    return {in<E>(x), in<E>(last), in<E>(maa), in<E>(low), as_floats(in<E>(up), n * rank * channels, floats),
            {tokens, tokens / sequences, sequences, cu_seqlens}, channels, rank, n};
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

void mix_lerp_forward(const void* x, const void* last, const void* maa, const void* low, const void* up, void* const* outs,
                      int n, int64_t tokens, int64_t channels, int64_t rank, int64_t sequences, const int64_t* cu_seqlens,
                      int bfloat16, int threads) {
    std::vector<float> floats;
    BY_TYPE(lerp<E>(x, last, maa, low, up, floats, n, tokens, channels, rank, sequences, cu_seqlens)
                .forward(reinterpret_cast<E* const*>(outs), threads))
}

void mix_lerp_backward(const void* x, const void* last, const void* maa, const void* low, const void* up,
                       const void* const* grads, void* gx, void* glast, float* gmaa, void* glow, float* gup, int n,
                       int64_t tokens, int64_t channels, int64_t rank, int64_t sequences, const int64_t* cu_seqlens,
                       int bfloat16, int threads) {
    std::vector<float> floats;
    BY_TYPE(lerp<E>(x, last, maa, low, up, floats, n, tokens, channels, rank, sequences, cu_seqlens)
                .backward(reinterpret_cast<const E* const*>(grads), {out<E>(gx), out<E>(glast), gmaa, out<E>(glow), gup},
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
