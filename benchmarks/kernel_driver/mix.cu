// The kernels of what stands between a block's matrix products, each by itself. ops/mix/cuda.py says in which order an
// operation's tensors stand.
#include "case.cuh"
#include "mix/mix.cu"

using Launcher = Kernel<MixArguments>;
struct RowsOperation {
    const char* name;
    Launcher float32, bfloat16;
    int inputs, outputs, parameters, sums;
    bool heads;
};
#define ROWS(name, ...) {#name, LAUNCHER(mix_##name##_float32), LAUNCHER(mix_##name##_bfloat16), __VA_ARGS__}

constexpr index_t TOKENS = 130;
constexpr int STRIP = 32;
const std::vector<index_t> BOUNDS = {0, 1, 64, 129, 130};

static MixArguments arguments(int channels, int size) {
    MixArguments a = {};
    a.tokens = TOKENS, a.channels = channels, a.size = size, a.strip = STRIP, a.eps = 1e-5f;
    return a;
}
static int row_blocks(const MixArguments& a) {
    return quotient_up(a.tokens, a.strip) * quotient_up(a.channels, a.size);
}
template <class E>
static float* strip_sums(Case& c, const MixArguments& a) {
    return c.result<float>(quotient_up(a.tokens, a.strip) * a.channels);
}

template <class E>
static bool rows(const RowsOperation& of) {
    Case c(std::string("mix ") + of.name + " " + DTYPE<E>);
    MixArguments a = of.heads ? arguments(2 * 20, 20) : arguments(200, MOST_SIZE);
    for (int i = 0; i < of.inputs; i++) a.inputs[i] = c.input<E>(TOKENS * a.channels, 0.1f, 1);  // of which roots are
    for (int i = 0; i < of.outputs; i++) a.outputs[i] = c.result<E>(TOKENS * a.channels);
    for (int i = 0; i < of.parameters; i++) a.parameters[i] = c.input<E>(a.channels);
    for (int i = 0; i < of.sums; i++) a.sums[i] = strip_sums<E>(c, a);
    c.launched((std::is_same_v<E, float> ? of.float32 : of.bfloat16)(a, row_blocks(a)));
    return c.right();
}

// Packed sequences, and what precedes them.
template <class E>
static void give_sequences(Case& c, MixArguments& a, bool backward) {
    a.bounds = c.given(BOUNDS), a.sequences = int(BOUNDS.size()) - 1;
    a.last = c.input<E>(a.sequences * a.channels);
    if (backward) a.glast = c.result<E>(a.sequences * a.channels);
}

template <class E>
static bool lerp(Launcher forward, Launcher backward) {
    Case c(std::string("mix lerp ") + DTYPE<E>);
    MixArguments a = arguments(200, MOST_SIZE);
    const size_t elements = TOKENS * a.channels;
    a.n = MOST_POINTS;
    give_sequences<E>(c, a, true);
    a.inputs[0] = c.input<E>(elements), a.inputs[1] = c.input<E>(a.n * elements);
    a.parameters[0] = c.input<E>(a.n * a.channels);
    for (int i = 0; i < a.n; i++) a.outputs[i] = c.result<E>(elements);
    c.launched(forward(a, row_blocks(a)));
    for (int i = 0; i < a.n; i++) a.inputs[2 + i] = c.input<E>(elements), a.sums[i] = strip_sums<E>(c, a);
    a.outputs[0] = c.result<E>(elements), a.outputs[1] = c.result<E>(a.n * elements);
    c.launched(backward(a, row_blocks(a)));
    return c.right();
}

static bool low_rank(int rank, Launcher forward, Launcher backward) {
    Case c("mix lerp_low " + std::to_string(rank));
    MixArguments a = arguments(2 * NARROW, NARROW);
    const size_t elements = TOKENS * a.channels, low = TOKENS * LOW_POINTS * rank;
    const int groups = a.channels / a.size;
    give_sequences<bf16>(c, a, true);
    a.inputs[0] = c.input<bf16>(elements), a.inputs[1] = c.input<bf16>(low);
    a.inputs[2] = c.input<bf16>(LOW_POINTS * rank * a.channels),
    a.parameters[0] = c.input<bf16>(LOW_POINTS * a.channels);
    for (int i = 0; i < LOW_POINTS; i++) a.outputs[i] = c.result<bf16>(elements);
    c.launched(forward(a, quotient_up(TOKENS, TILE_TOKENS) * groups));
    for (int i = 0; i < LOW_POINTS; i++) a.inputs[5 + i] = c.input<bf16>(elements);
    a.outputs[0] = c.result<bf16>(elements), a.outputs[1] = c.result<bf16>(groups * low);
    c.launched(backward(a, quotient_up(TOKENS, TILE_TOKENS - 1) * groups));
    return c.right();
}

// The same of what it normalizes itself, with low's tanh and the first point's product inside, and what adds up the
// parts.
static bool ddlerp(int rank, Launcher forward, Launcher backward, Launcher tanh, Launcher tanh_backward) {
    Case c("mix ddlerp " + std::to_string(rank));
    MixArguments a = arguments(2 * NARROW, NARROW);
    const int groups = a.channels / a.size, decay = 2 * rank;
    const size_t elements = TOKENS * a.channels, width = LOW_POINTS * rank;
    give_sequences<bf16>(c, a, true);
    bf16 *const low = c.input<bf16>(TOKENS * width), *const factor = c.result<bf16>(TOKENS * decay);
    bf16* const glow = c.result<bf16>(groups * TOKENS * width);
    float* const parts = c.result<float>(groups * TOKENS * decay);
    a.inputs[0] = c.input<bf16>(elements), a.inputs[1] = low, a.inputs[2] = c.input<bf16>(width * a.channels);
    a.inputs[3] = c.input<float>(2 * TOKENS), a.inputs[4] = c.input<bf16>(a.channels * decay);
    a.parameters[0] = c.input<bf16>(LOW_POINTS * a.channels);
    a.parameters[1] = c.input<bf16>(a.channels), a.parameters[2] = c.input<bf16>(a.channels);
    for (int i = 1; i < LOW_POINTS; i++) a.outputs[i] = c.result<bf16>(elements);
    a.outputs[LOW_POINTS] = parts;
    c.launched(forward(a, quotient_up(TOKENS, TILE_TOKENS) * groups));
    for (int i = 1; i < LOW_POINTS; i++) a.inputs[5 + i] = c.input<bf16>(elements);
    a.inputs[10] = factor, a.inputs[11] = c.input<bf16>(TOKENS * decay);
    a.outputs[0] = c.result<bf16>(elements), a.outputs[1] = glow;
    MixArguments sum = arguments(decay, MOST_SIZE);
    sum.n = groups, sum.inputs[0] = parts, sum.outputs[0] = factor;
    c.launched(tanh(sum, row_blocks(sum)));
    c.launched(backward(a, quotient_up(TOKENS, TILE_TOKENS - 1) * groups));
    sum.channels = int(width), sum.inputs[0] = low, sum.inputs[1] = glow,
    sum.outputs[0] = c.result<bf16>(TOKENS * width);
    c.launched(tanh_backward(sum, row_blocks(sum)));
    return c.right();
}

// The norm of heads with a bonus that is given.
template <class E>
static bool bonus_gate(Launcher forward, Launcher backward) {
    Case c(std::string("mix bonus_gate ") + DTYPE<E>);
    MixArguments a = arguments(2 * 20, 20);
    const size_t elements = TOKENS * a.channels, heads = TOKENS * 2;
    float* const bonus = c.input<float>(heads);
    for (int i = 0; i < 3; i++) a.inputs[i] = c.input<E>(elements);
    for (int i = 0; i < 2; i++) a.parameters[i] = c.input<E>(a.channels);
    a.inputs[3] = bonus, a.outputs[0] = c.result<E>(elements);
    c.launched(forward(a, row_blocks(a)));
    a.inputs[3] = c.input<E>(elements), a.inputs[4] = bonus;
    for (int i = 0; i < 3; i++) a.outputs[i] = c.result<E>(elements);
    a.outputs[3] = c.result<float>(heads);
    c.launched(backward(a, row_blocks(a)));
    return c.right();
}

// width: elements that a thread reads at once.
template <class E>
static bool norm_lerp(Launcher forward, Launcher backward, int channels, int width) {
    Case c("mix norm_lerp " + std::to_string(channels) + " " + DTYPE<E>);
    MixArguments a = arguments(channels, width);
    const size_t elements = TOKENS * channels;
    const int blocks = quotient_up(TOKENS, STRIP);
    a.n = LOW_POINTS;
    give_sequences<E>(c, a, true);
    float* const stats = c.result<float>(2 * TOKENS);
    E *const weight = c.input<E>(channels), *const maa = c.input<E>(a.n * channels);
    a.inputs[0] = c.input<E>(elements);
    a.parameters[0] = weight, a.parameters[1] = c.input<E>(channels), a.parameters[2] = maa;
    a.outputs[0] = stats, a.outputs[1] = c.result<E>(a.sequences * channels);
    for (int i = 0; i < a.n; i++) a.outputs[2 + i] = c.result<E>(elements);
    c.launched(forward(a, blocks));
    a.inputs[1] = c.input<E>(elements), a.inputs[2] = c.input<E>(elements), a.inputs[3] = stats;
    a.inputs[4] = c.input<E>(a.sequences * channels), a.parameters[1] = maa, a.outputs[0] = c.result<E>(elements);
    for (int i = 0; i < a.n; i++) a.inputs[5 + i] = c.input<E>(elements);
    c.launched(backward(a, blocks));
    return c.right();
}

#define NORM_LERP(E, dtype, ...) \
    norm_lerp<E>(LAUNCHER(mix_norm_lerp_forward_##dtype), LAUNCHER(mix_norm_lerp_backward_##dtype), __VA_ARGS__)

#define DDLERP(K)                                                                      \
    ddlerp(K, LAUNCHER(mix_lerp_low_forward_##K), LAUNCHER(mix_lerp_low_backward_##K), \
           LAUNCHER(mix_tanh_forward_bfloat16), LAUNCHER(mix_tanh_backward_bfloat16))

int main() {
    const RowsOperation operations[] = {
        ROWS(relu_square_forward, 1, 1, 0, 0, false),    ROWS(relu_square_backward, 2, 1, 0, 0, false),
        ROWS(sigmoid_gate_forward, 2, 1, 0, 0, false),   ROWS(sigmoid_gate_backward, 3, 2, 0, 0, false),
        ROWS(value_residual_forward, 3, 1, 1, 0, false), ROWS(value_residual_backward, 4, 3, 1, 1, false),
        ROWS(norm_gate_forward, 2, 1, 2, 0, true),       ROWS(norm_gate_backward, 3, 2, 2, 2, true),
        ROWS(delta_keys_forward, 2, 3, 3, 0, true),      ROWS(delta_keys_backward, 5, 2, 3, 3, true),
        ROWS(norm_bonus_gate_forward, 5, 1, 3, 0, true), ROWS(norm_bonus_gate_backward, 6, 5, 3, 3, true)};
    bool right = true;
    for (const RowsOperation& operation : operations) {
        right &= rows<float>(operation);
        right &= rows<bf16>(operation);
    }
    right &= lerp<float>(LAUNCHER(mix_lerp_forward_float32), LAUNCHER(mix_lerp_backward_float32));
    right &= lerp<bf16>(LAUNCHER(mix_lerp_forward_bfloat16), LAUNCHER(mix_lerp_backward_bfloat16));
    right &= bonus_gate<float>(LAUNCHER(mix_bonus_gate_forward_float32), LAUNCHER(mix_bonus_gate_backward_float32));
    right &= bonus_gate<bf16>(LAUNCHER(mix_bonus_gate_forward_bfloat16), LAUNCHER(mix_bonus_gate_backward_bfloat16));
    right &= low_rank(32, LAUNCHER(mix_lerp_low_forward_32), LAUNCHER(mix_lerp_low_backward_32));
    right &= low_rank(64, LAUNCHER(mix_lerp_low_forward_64), LAUNCHER(mix_lerp_low_backward_64));
    right &= DDLERP(32);
    right &= DDLERP(64);
    right &= NORM_LERP(float, float32, 2112, WIDEST<float>);
    right &= NORM_LERP(bf16, bfloat16, 2112, WIDEST<bf16>);
    right &= NORM_LERP(bf16, bfloat16, 1152, 2);
    return right ? 0 : 1;
}
