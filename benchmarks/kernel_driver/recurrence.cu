// Every kernel of a recurrence, forward and backward over packed sequences: plain and on tensor cores, and with time
// split. -DGENERATION=6 or 7.
#include "case.cuh"
#if GENERATION == 7
#include "wkv7/wkv7.cu"
#else
#include "wkv6/wkv6.cu"
#endif

constexpr int HEADS = 2;
const std::vector<index_t> BOUNDS = {0, 1, 18, 82, 147, 147, 277, 280, 280, 280};

using Launcher = int (*)(const Arguments*, int, int, int, void*);  // a kernel's NAME_run

// A direction's kernels, as ops/wkv6/cuda.py and ops/wkv7/cuda.py plan them.
struct Way {
    Launcher kernel;
    dim3 block;
    Launcher groups = nullptr, scan = nullptr;  // where time is split, a pass over the groups and a scan come before
    int pass_threads = 0;
};

#if GENERATION == 7
constexpr int SCAN_BLOCKS = 4;             // of 128 threads, a sequence's head
static Way way_with_keys(bool backward) {  // of head size 64
    return backward
               ? Way{wkv7_backward_keys_64_run, 128, wkv7_backward_groups_keys_64_run, wkv7_backward_scan_64_run, 256}
               : Way{wkv7_forward_keys_64_run, 256, wkv7_forward_groups_keys_64_run, wkv7_forward_scan_64_run, 256};
}
static Way way(bool backward, int N, bool is_float32) {
    if (!is_float32 && N == 64)
        return backward ? Way{wkv7_backward_64_run, 128, wkv7_backward_groups_64_run, wkv7_backward_scan_64_run, 256}
                        : Way{wkv7_forward_64_run, 256, wkv7_forward_groups_64_run, wkv7_forward_scan_64_run, 256};
    int strips = 1;
    while (strips * STRIP < N) strips *= 2;
    const int rows = 32 / strips;
    const dim3 block(strips, quotient_up(N, rows) * rows);
    if (is_float32) return {backward ? wkv7_backward_plain_float32_run : wkv7_forward_plain_float32_run, block};
    return {backward ? wkv7_backward_plain_bfloat16_run : wkv7_forward_plain_bfloat16_run, block};
}
static int scan_blocks(int) { return SCAN_BLOCKS; }
#else
static Way way(bool backward, int N, bool is_float32) {
    if (!is_float32 && N == 64)
        return backward ? Way{wkv6_backward_64_run, 128, wkv6_backward_groups_64_run, wkv6_backward_scan_run, 128}
                        : Way{wkv6_forward_64_run, 128, wkv6_forward_groups_64_run, wkv6_forward_scan_run, 128};
    const dim3 block(N, quotient_up(N, STRIP));
    if (is_float32) return {backward ? wkv6_backward_plain_float32_run : wkv6_forward_plain_float32_run, block};
    return {backward ? wkv6_backward_plain_bfloat16_run : wkv6_forward_plain_bfloat16_run, block};
}
static int scan_blocks(int N) { return N * N / (4 * SCAN_THREADS); }
static Way way_with_keys(bool) { return {}; }
#endif

// group: the tokens of one where time is split, or 0; keys: by the kernels that make wkv7's keys.
template <class E>
static bool run(int N, int group = 0, bool keys = false) {
    constexpr bool is_float32 = std::is_same_v<E, float>;
    Case c("wkv" + std::to_string(GENERATION) + " " + std::to_string(N) + " " + DTYPE<E> + " groups of " +
           std::to_string(group) + (keys ? " with keys" : ""));
    const size_t tokens = BOUNDS.back(), sequences = BOUNDS.size() - 1, channels = HEADS * N, state = channels * N;
    const size_t groups = group ? tokens / group + sequences : sequences, elements = tokens * channels;
    const auto way_of = [&](bool backward) { return keys ? way_with_keys(backward) : way(backward, N, is_float32); };
    const Way ways[] = {way_of(false), way_of(true)};
    Arguments a = {};
    a.sequences = int(sequences), a.length = int(tokens), a.heads = HEADS, a.head_size = N;
    a.group = group, a.groups = int(groups), a.bounds = c.given(BOUNDS);
    a.r = c.input<E>(elements), a.k = c.input<E>(elements), a.v = c.input<E>(elements);
    a.w = c.input<E>(elements, -6, 1), a.gy = c.input<E>(elements);
    a.state = c.input<float>(sequences * state), a.gfinal = c.input<float>(sequences * state);
    a.y = c.result<E>(elements), a.final_state = c.result<float>(sequences * state);
    a.gr = c.result<E>(elements), a.gk = c.result<E>(elements), a.gv = c.result<E>(elements);
    a.gw = c.result<E>(elements), a.gstate = c.result<float>(sequences * state);
    const size_t slots = (tokens / SEGMENT + sequences) * state;
#if GENERATION == 7
    const float small = 1 / std::sqrt(float(N));  // else states grow without bound
    if (keys) {
        a.low = c.input<E>(elements), a.glow = c.result<E>(elements);
        a.a0 = c.input<E>(channels), a.k_k = c.input<E>(channels), a.k_a = c.input<E>(channels);
        a.r_k = c.input<E>(channels), a.gbonus = c.input<float>(tokens * HEADS);
        a.bonus = c.result<float>(tokens * HEADS), a.scales = c.result<float>(tokens * HEADS);
    } else {
        a.a = c.input<E>(elements, -small, small), a.b = c.input<E>(elements, -small, small);
        a.ga = c.result<E>(elements), a.gb = c.result<E>(elements);
    }
    a.checkpoints = c.room<float>(slots);
    const size_t transitions = group ? groups * state : 0;
#else
    a.u = c.input<float>(channels), a.gu = c.result<float>(groups * channels);
    a.checkpoints = c.room<float>(ways[0].groups ? slots / 2 : slots);
    const size_t transitions = group ? groups * channels : 0;
#endif
    if (group) a.transitions = c.room<float>(transitions);
    for (const Way& w : ways) {
        if (group) {
            a.parts = c.room<float>(groups * state);
            c.launched(w.groups(&a, HEADS * a.groups, w.pass_threads, 1, nullptr));
            c.launched(w.scan(&a, HEADS * a.sequences * scan_blocks(N), 128, 1, nullptr));
        }
        c.launched(w.kernel(&a, HEADS * a.groups, int(w.block.x), int(w.block.y), nullptr));
    }
    return c.right();
}

int main() {
    bool right = true;
    for (const int N : {20, 32, 64, 128}) {
        right &= run<float>(N);
        right &= run<bf16>(N);
        if (way(false, N, false).groups) right &= run<bf16>(N, 64);
    }
    if (GENERATION == 7)
        for (const int group : {0, 64}) right &= run<bf16>(64, group, true);
    return right ? 0 : 1;
}
