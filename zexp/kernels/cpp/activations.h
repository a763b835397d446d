// The functions of one value that MLPs use, with their slopes, and their application to rows. The numbers are those of the names in activation/names.py.
#pragma once

#include "vector.h"

namespace zexp {

struct Both {
    float value, slope;
};

struct Silu {
    static Both of(float x) {
        float s = sigmoid(x), y = x * s;
        return {y, s + y * (1.0f - s)};
    }
};

// The normal distribution's function to 1e-7 (Abramowitz & Stegun, 7.1.26).
struct GeluErf {
    static Both of(float x) {
        float z = std::abs(x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z), bell = exp(-z * z);
        float tail = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
        tail *= 0.5f * bell;
        float below = x >= 0 ? 1.0f - tail : tail;
        return {x * below, below + x * 0.39894228f * bell};
    }
};

// Hendrycks & Gimpel's approximation (arXiv:1606.08415); tanh u = 2 sigmoid(2 u) - 1.
struct GeluTanh {
    static Both of(float x) {
        float u = 0.79788456f * (x + 0.044715f * x * x * x), s = sigmoid(2.0f * u);
        float near = x > 10.0f ? 10.0f : (x < -10.0f ? -10.0f : x);  // beyond it s (1 - s) is 0, and the square may be infinite
        return {x * s, s + 2.0f * near * s * (1.0f - s) * 0.79788456f * (1.0f + 0.134145f * near * near)};
    }
};

struct Relu {
    static Both of(float x) { return {x > 0 ? x : (x != x ? x : 0.0f), x > 0 ? 1.0f : 0.0f}; }
};

struct Relu2 {
    static Both of(float x) {
        float y = x > 0 ? x : (x != x ? x : 0.0f);
        return {y * y, 2.0f * y};
    }
};

// run(Silu{}) and so on, by number.
template <class Run>
void with_gate(int64_t gate, Run run) {
    switch (gate) {
        case 0: return run(Silu{});
        case 1: return run(GeluErf{});
        case 2: return run(GeluTanh{});
        case 3: return run(Relu{});
        case 4: return run(Relu2{});
    }
}

template <class Gate, class T>
void plain(const T* x, T* y, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) y[i] = stored<T>(Gate::of(load(x[i])).value);
}

template <class Gate, class T>
void gated(const T* gate, const T* up, T* y, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) y[i] = stored<T>(Gate::of(load(gate[i])).value * load(up[i]));
}

// y (M, F) = act(x), x (M, F), or act(gate) * up, x (M, 2 F), if `is_gated`.
template <class T>
void activate(const T* x, T* y, int64_t rows, int64_t width, int64_t gate, bool is_gated, int threads) {
    with_gate(gate, [=](auto function) {
        using Gate = decltype(function);
#pragma omp parallel for num_threads(threads)
        for (int64_t m = 0; m < rows; m++) {
            if (is_gated) {
                gated<Gate>(x + 2 * m * width, x + (2 * m + 1) * width, y + m * width, width);
            } else {
                plain<Gate>(x + m * width, y + m * width, width);
            }
        }
    });
}

}  // namespace zexp
