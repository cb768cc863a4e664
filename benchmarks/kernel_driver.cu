// A recurrence's kernels in a program of their own, without Python and torch around them, for compute-sanitizer:
// forward and backward over packed sequences, all head sizes, both dtypes. Exit code 1 where CUDA reports an error or a
// result is not finite. GENERATION is 6 or 7.
//
//   nvcc -std=c++17 -O2 -lineinfo -arch=native -DGENERATION=7 -I cuda benchmarks/kernel_driver.cu -o driver && ./driver
#include <cmath>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <vector>

#if GENERATION == 7
#include "wkv7/wkv7.cu"
#else
#include "wkv6/wkv6.cu"
#endif

constexpr int HEADS = 2;
const std::vector<index_t> BOUNDS = {0, 1, 18, 82, 147, 277, 280};

// Memory on the GPU that ends with its owner.
template <class T>
struct Device {
    T* at = nullptr;
    size_t count;
    explicit Device(const std::vector<T>& values) : count(values.size()) {
        cudaMalloc(&at, count * sizeof(T));
        cudaMemcpy(at, values.data(), count * sizeof(T), cudaMemcpyHostToDevice);
    }
    explicit Device(size_t count) : count(count) { cudaMalloc(&at, count * sizeof(T)); }
    Device(const Device&) = delete;
    ~Device() { cudaFree(at); }
    std::vector<T> host() const {
        std::vector<T> values(count);
        cudaMemcpy(values.data(), at, count * sizeof(T), cudaMemcpyDeviceToHost);
        return values;
    }
};

static void assign(float& to, float value) { to = value; }
static void assign(bf16& to, float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    bits >>= 16;  // truncated, which serves here
    std::memcpy(&to, &bits, 2);
}
static float read(float value) { return value; }
static float read(bf16 value) {
    unsigned bits = 0;
    std::memcpy(reinterpret_cast<char*>(&bits) + 2, &value, 2);
    float whole;
    std::memcpy(&whole, &bits, 4);
    return whole;
}

// Numbers between low and high that look random and are the same on every machine.
template <class T>
static std::vector<T> numbers(size_t count, unsigned seed, float low, float high) {
    std::vector<T> values(count);
    for (T& value : values) {
        seed = seed * 1664525u + 1013904223u;
        assign(value, low + (high - low) * (seed >> 8) / 16777216.0f);
    }
    return values;
}

template <class T>
static bool finite(const Device<T>& values) {
    for (const T value : values.host())
        if (!std::isfinite(read(value))) return false;
    return true;
}

using Launcher = int (*)(const Arguments*, int, int, int, void*);  // a kernel's NAME_run
struct Step {
    Launcher kernel;
    int blocks;
    dim3 block;
};

// Launches forward and backward as ops/wkv6/cuda.py and ops/wkv7/cuda.py plan them; -> CUDA's error code.
static int launch_both(const Arguments& a, bool is_float32) {
    const int N = a.head_size;
#if GENERATION == 7
    const dim3 plain(N / STRIP, N);
    Launcher forward = wkv7_forward_plain_bfloat16_run, backward = wkv7_backward_plain_bfloat16_run;
    if (is_float32) forward = wkv7_forward_plain_float32_run, backward = wkv7_backward_plain_float32_run;
    const bool chunked = !is_float32 && N == 64;
    if (chunked) forward = wkv7_forward_64_run, backward = wkv7_backward_64_run;
    const dim3 forward_block = chunked ? dim3(256) : plain, backward_block = chunked ? dim3(128) : plain;
#else
    const dim3 plain(N, N / STRIP), chunked(2 * N);
    Launcher forward = wkv6_forward_128_run, backward = wkv6_backward_plain_bfloat16_run;
    if (N == 32) forward = wkv6_forward_32_run, backward = wkv6_backward_32_run;
    if (N == 64) forward = wkv6_forward_64_run, backward = wkv6_backward_64_run;
    if (is_float32) forward = wkv6_forward_plain_float32_run, backward = wkv6_backward_plain_float32_run;
    const dim3 forward_block = is_float32 ? plain : chunked, backward_block = is_float32 || N == 128 ? plain : chunked;
#endif
    const int blocks = a.heads * a.groups;
    std::vector<Step> steps = {{forward, blocks, forward_block}, {backward, blocks, backward_block}};
#if GENERATION == 7
    if (a.group) {
        const dim3 passes(256), scans(128);
        const int scan_blocks = 4 * a.heads * a.sequences;
        steps = {
            {wkv7_forward_groups_64_run, blocks, passes},  {wkv7_forward_scan_64_run, scan_blocks, scans},  steps[0],
            {wkv7_backward_groups_64_run, blocks, passes}, {wkv7_backward_scan_64_run, scan_blocks, scans}, steps[1]};
    }
#endif
    for (const Step& step : steps)
        if (const int status = step.kernel(&a, step.blocks, step.block.x, step.block.y, nullptr)) return status;
    return 0;
}

// group: the tokens of one where time is split, or 0.
template <class T>
static bool run(int head_size, int group = 0) {
    constexpr bool is_float32 = std::is_same_v<T, float>;
    const size_t tokens = BOUNDS.back(), sequences = BOUNDS.size() - 1;
    const size_t elements = tokens * HEADS * head_size, state = size_t(HEADS) * head_size * head_size;
    Device<index_t> bounds(BOUNDS);
    Device<T> r(numbers<T>(elements, 1, -1, 1)), k(numbers<T>(elements, 2, -1, 1)), v(numbers<T>(elements, 3, -1, 1));
    Device<T> w(numbers<T>(elements, 4, -6, 1)), gy(numbers<T>(elements, 5, -1, 1));
    Device<T> y(elements), gr(elements), gk(elements), gv(elements), gw(elements);
    Device<float> initial(numbers<float>(sequences * state, 7, -1, 1)), final_state(sequences * state);
    Device<float> checkpoints((tokens / SEGMENT + sequences) * state);
    Device<float> gfinal(numbers<float>(sequences * state, 8, -1, 1)), gstate(sequences * state);
    Arguments a = {};
    a.r = r.at, a.k = k.at, a.v = v.at, a.w = w.at, a.state = initial.at, a.bounds = bounds.at;
    a.y = y.at, a.final_state = final_state.at, a.checkpoints = checkpoints.at;
    a.gy = gy.at, a.gfinal = gfinal.at, a.gr = gr.at, a.gk = gk.at, a.gv = gv.at, a.gw = gw.at, a.gstate = gstate.at;
    a.sequences = int(sequences), a.length = int(tokens), a.heads = HEADS, a.head_size = head_size;
    const size_t groups = group ? tokens / group + sequences : sequences;
    Device<float> parts(groups * state), transitions(groups * state);
    a.group = group, a.groups = int(groups), a.parts = parts.at, a.transitions = transitions.at;
#if GENERATION == 7
    const float small = 1 / std::sqrt(float(head_size));  // else states grow without bound
    Device<T> taken(numbers<T>(elements, 6, -small, small)), put(numbers<T>(elements, 9, -small, small));
    Device<T> ga(elements), gb(elements);
    a.a = taken.at, a.b = put.at, a.ga = ga.at, a.gb = gb.at;
    const int status = launch_both(a, is_float32);
    const cudaError_t error = cudaDeviceSynchronize();
    const bool own = finite(ga) && finite(gb);
#else
    Device<float> u(numbers<float>(HEADS * head_size, 6, -1, 1)), gu(sequences * HEADS * head_size);
    a.u = u.at, a.gu = gu.at;
    const int status = launch_both(a, is_float32);
    const cudaError_t error = cudaDeviceSynchronize();
    const bool own = finite(gu);
#endif
    const bool right = status == 0 && error == cudaSuccess && own && finite(y) && finite(final_state) && finite(gr) &&
                       finite(gk) && finite(gv) && finite(gw) && finite(gstate);
    std::printf(
        "{\"generation\": %d, \"head_size\": %d, \"dtype\": \"%s\", \"group\": %d, \"right\": %s, \"error\": \"%s\"}\n",
        GENERATION, head_size, is_float32 ? "float32" : "bfloat16", group, right ? "true" : "false",
        cudaGetErrorString(error));
    return right;
}

int main() {
    bool right = true;
    for (const int head_size : {32, 64, 128}) {
        right &= run<float>(head_size);
        right &= run<bf16>(head_size);
    }
#if GENERATION == 7
    right &= run<bf16>(64, 64);
#endif
    return right ? 0 : 1;
}
