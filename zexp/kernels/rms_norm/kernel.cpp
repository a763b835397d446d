// RMSNorm of rows and its gradient. M rows, D width. Kept for the backward pass: x and one number a row.
#include "vector.h"

using namespace zexp;

namespace {

constexpr int64_t PARTS = 32;  // of the rows, each with a sum of its own of the weight's gradient

template <class T>
void forward(const T* x, const float* weight, T* y, float* inverse, int64_t rows, int64_t width, float eps, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < rows; m++) {
        const T* from = x + m * width;
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t d = 0; d < width; d++) squares += load(from[d]) * load(from[d]);
        float scale = 1.0f / std::sqrt(squares / width + eps);
        inverse[m] = scale;
        T* to = y + m * width;
#pragma omp simd
        for (int64_t d = 0; d < width; d++) to[d] = stored<T>(load(from[d]) * scale * weight[d]);
    }
}

// dweight (PARTS, D).
template <class T>
void backward(const T* dy, const T* x, const float* weight, const float* inverse, T* dx, float* dweight, int64_t rows,
              int64_t width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t part = 0; part < PARTS; part++) {
        float* sum = dweight + part * width;
        for (int64_t d = 0; d < width; d++) sum[d] = 0.0f;
        for (int64_t m = rows * part / PARTS; m < rows * (part + 1) / PARTS; m++) {
            const T *given = dy + m * width, *from = x + m * width;
            float scale = inverse[m], along = 0.0f;
#pragma omp simd reduction(+ : along)
            for (int64_t d = 0; d < width; d++) {
                float weighted = load(given[d]) * load(from[d]) * scale;
                sum[d] += weighted;
                along += weighted * weight[d];
            }
            float mean = along / width;
            T* to = dx + m * width;
#pragma omp simd
            for (int64_t d = 0; d < width; d++)
                to[d] = stored<T>(scale * (load(given[d]) * weight[d] - load(from[d]) * scale * mean));
        }
    }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                     \
    extern "C" void forward_##NAME(const T* x, const float* weight, T* y, float* inverse, int64_t rows, int64_t width,      \
                                   float eps, int64_t threads) {                                                            \
        forward(x, weight, y, inverse, rows, width, eps, threads);                                                          \
    }                                                                                                                       \
    extern "C" void backward_##NAME(const T* dy, const T* x, const float* weight, const float* inverse, T* dx,              \
                                    float* dweight, int64_t rows, int64_t width, int64_t threads) {                         \
        backward(dy, x, weight, inverse, dx, dweight, rows, width, threads);                                                \
    }                                                                                                                       \
    extern "C" int64_t parts_##NAME() { return PARTS; }
EXPORT(float, f32)
EXPORT(bf16, bf16)
