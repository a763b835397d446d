// What surrounds the experts' matrix products. M tokens, D model width, K choices of a token, N = K M choices sorted by expert, F
// expert width, H rows of `up`: F, or 2 F with a gate.
#include "activations.h"

using namespace zexp;

namespace {

// out (N, D): each choice's token, zeros where there is none (-1).
template <class T>
void gather(const T* x, const int64_t* token, T* out, int64_t choices, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < choices; n++) {
        if (token[n] < 0)
            std::memset(out + n * width, 0, width * sizeof(T));
        else
            std::memcpy(out + n * width, x + token[n] * width, width * sizeof(T));
    }
}

// out (M, D), fp32: the sum of each token's rows times their weights (K, M), or as they are (null). places (K, M): of the rows.
template <class T>
void combine(const T* rows, const int64_t* places, const float* weights, float* out, int64_t tokens, int64_t width, int64_t choices,
             int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < tokens; m++) {
        float* to = out + m * width;
        for (int64_t d = 0; d < width; d++) to[d] = 0.0f;
        for (int64_t k = 0; k < choices; k++) {
            const T* from = rows + places[k * tokens + m] * width;
            float weight = weights == nullptr ? 1.0f : weights[k * tokens + m];
#pragma omp simd
            for (int64_t d = 0; d < width; d++) to[d] += load(from[d]) * weight;
        }
    }
}

// From dacted (n, F), the gradient of what was activated as if its weight were 1: in its place what was activated, times the weight;
// dhidden (n, H) with the weight; dweight (n).
template <class T>
void activate_backward(const T* hidden, T* dacted, const float* weight, T* dhidden, float* dweight, int64_t rows, int64_t width,
                       int64_t gate, bool gated, int threads) {
    with_gate(gate, [=](auto function) {
        using Gate = decltype(function);
#pragma omp parallel for num_threads(threads)
        for (int64_t n = 0; n < rows; n++) {
            int64_t at = n * width * (gated ? 2 : 1);
            const T *from = hidden + at, *up = from + width;
            T *own = dacted + n * width, *to = dhidden + at, *dup = to + width;
            float scale = weight[n], along = 0.0f;
            if (gated) {
#pragma omp simd reduction(+ : along)
                for (int64_t f = 0; f < width; f++) {
                    Both act = Gate::of(load(from[f]));
                    float given = load(own[f]), other = load(up[f]), value = act.value * other;
                    along += given * value;
                    to[f] = stored<T>(given * other * act.slope * scale);
                    dup[f] = stored<T>(given * act.value * scale);
                    own[f] = stored<T>(value * scale);
                }
            } else {
#pragma omp simd reduction(+ : along)
                for (int64_t f = 0; f < width; f++) {
                    Both act = Gate::of(load(from[f]));
                    float given = load(own[f]);
                    along += given * act.value;
                    to[f] = stored<T>(given * act.slope * scale);
                    own[f] = stored<T>(act.value * scale);
                }
            }
            dweight[n] = along;
        }
    });
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                          \
    extern "C" {                                                                                                                 \
    void gather_##NAME(const T* x, const int64_t* token, T* out, int64_t choices, int64_t width, int64_t threads) {              \
        gather(x, token, out, choices, width, threads);                                                                          \
    }                                                                                                                            \
    void combine_##NAME(const T* rows, const int64_t* places, const float* weights, float* out, int64_t tokens, int64_t width,   \
                        int64_t choices, int64_t threads) {                                                                      \
        combine(rows, places, weights, out, tokens, width, choices, threads);                                                    \
    }                                                                                                                            \
    void activate_##NAME(const T* hidden, T* acted, int64_t rows, int64_t width, int64_t gate, int64_t gated, int64_t threads) {   \
        activate(hidden, acted, rows, width, gate, gated != 0, threads);                                                         \
    }                                                                                                                            \
    void activate_backward_##NAME(const T* hidden, T* dacted, const float* weight, T* dhidden, float* dweight, int64_t rows,     \
                                  int64_t width, int64_t gate, int64_t gated, int64_t threads) {                                 \
        activate_backward(hidden, dacted, weight, dhidden, dweight, rows, width, gate, gated != 0, threads);                     \
    }                                                                                                                            \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
