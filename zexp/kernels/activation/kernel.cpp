// Activations of MLPs and their gradients: act(x), or act(gate) * up of the halves of a row. M rows, F numbers of a result's row.
#include "activations.h"

using namespace zexp;

namespace {

template <class Gate, class T>
void plain_backward(const T* dy, const T* x, T* dx, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) dx[i] = stored<T>(load(dy[i]) * Gate::of(load(x[i])).slope);
}

template <class Gate, class T>
void gated_backward(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        Both act = Gate::of(load(gate[i]));
        float given = load(dy[i]);
        dgate[i] = stored<T>(given * load(up[i]) * act.slope);
        dup[i] = stored<T>(given * act.value);
    }
}

template <class T>
void backward(const T* dy, const T* x, T* dx, int64_t rows, int64_t width, int64_t gate, bool is_gated, int threads) {
    with_gate(gate, [=](auto function) {
        using Gate = decltype(function);
#pragma omp parallel for num_threads(threads)
        for (int64_t m = 0; m < rows; m++) {
            if (is_gated) {
                int64_t at = 2 * m * width;
                gated_backward<Gate>(dy + m * width, x + at, x + at + width, dx + at, dx + at + width, width);
            } else {
                plain_backward<Gate>(dy + m * width, x + m * width, dx + m * width, width);
            }
        }
    });
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                     \
    extern "C" void forward_##NAME(const T* x, T* y, int64_t rows, int64_t width, int64_t gate, int64_t is_gated,           \
                                   int64_t threads) {                                                                       \
        activate(x, y, rows, width, gate, is_gated != 0, threads);                                                           \
    }                                                                                                                       \
    extern "C" void backward_##NAME(const T* dy, const T* x, T* dx, int64_t rows, int64_t width, int64_t gate,              \
                                    int64_t is_gated, int64_t threads) {                                                    \
        backward(dy, x, dx, rows, width, gate, is_gated != 0, threads);                                                     \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
