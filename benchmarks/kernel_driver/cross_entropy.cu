// Cross-entropy's kernels, with the gradient and without.
#include "case.cuh"
#include "cross_entropy/cross_entropy.cu"

template <class E>
static bool run(const Kernel<CrossEntropyArguments>& kernel, index_t vocabulary, bool gradient) {
    Case c(std::string("cross_entropy ") + DTYPE<E> + (gradient ? " gradient" : ""));
    const std::vector<index_t> targets = {0, 700, vocabulary - 1};
    const size_t rows = targets.size(), logits = rows * vocabulary;
    CrossEntropyArguments a = {};
    a.logits = c.input<E>(logits, -9, 9), a.targets = c.given(targets), a.losses = c.result<float>(rows);
    if (gradient) a.gradient = c.result<E>(logits);
    a.vocabulary = vocabulary, a.scale = 0.5f, a.pull = 1e-4f;
    c.launched(kernel(a, int(rows)));
    return c.right();
}

int main() {
    bool right = true;
    for (const bool gradient : {false, true}) {
        right &= run<float>(LAUNCHER(cross_entropy_float32), 5001, gradient);
        right &= run<bf16>(LAUNCHER(cross_entropy_bfloat16), 9000, gradient);
    }
    return right ? 0 : 1;
}
