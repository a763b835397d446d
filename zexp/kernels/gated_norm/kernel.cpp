// RMSNorm of y * silu(z), or of y times silu(z), and their gradients. M rows, I width, each of G parts of a row by itself.
//
// Kept for the backward pass: y, z and one number a part. The sigmoid is taken twice: a vector of 16 exponentials costs about what
// it costs to fetch what was kept.
#include "vector.h"

using namespace zexp;

namespace {

constexpr int64_t PARTS = 32;  // of the rows, each with a sum of its own of the weight's gradient

struct Sizes {
    int64_t rows, width, groups;
    int64_t y_row, z_row;  // elements from one row to the next
};

// GATE_FIRST: the norm is of y * silu(z).
template <class T, bool GATE_FIRST>
void forward(const T* y, const T* z, const float* weight, T* out, float* inverse, Sizes size, float eps, int threads) {
    int64_t span = size.width / size.groups;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> room(2 * span);
        float *normed = room.data(), *gate = normed + span;
#pragma omp for
        for (int64_t m = 0; m < size.rows; m++) {
            for (int64_t g = 0; g < size.groups; g++) {
                const T *y_at = y + m * size.y_row + g * span, *z_at = z + m * size.z_row + g * span;
                float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
                for (int64_t i = 0; i < span; i++) {
                    float to = load(z_at[i]);
                    gate[i] = to * sigmoid(to);
                    normed[i] = GATE_FIRST ? load(y_at[i]) * gate[i] : load(y_at[i]);
                    squares += normed[i] * normed[i];
                }
                float scale = 1.0f / std::sqrt(squares / span + eps);
                inverse[m * size.groups + g] = scale;
                T* to = out + m * size.width + g * span;
                const float* own = weight + g * span;
#pragma omp simd
                for (int64_t i = 0; i < span; i++) {
                    float value = normed[i] * scale * own[i];
                    to[i] = stored<T>(GATE_FIRST ? value : value * gate[i]);
                }
            }
        }
    }
}

// dweight (PARTS, I).
template <class T, bool GATE_FIRST>
void backward(const T* dout, const T* y, const T* z, const float* weight, const float* inverse, T* dy, T* dz, float* dweight,
              Sizes size, int threads) {
    int64_t span = size.width / size.groups;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> room(3 * span);
        float *normed = room.data(), *gate = normed + span, *slope = gate + span;
#pragma omp for
        for (int64_t part = 0; part < PARTS; part++) {
            float* sums = dweight + part * size.width;
            for (int64_t i = 0; i < size.width; i++) sums[i] = 0.0f;
            for (int64_t m = size.rows * part / PARTS; m < size.rows * (part + 1) / PARTS; m++) {
                for (int64_t g = 0; g < size.groups; g++) {
                    const T *y_at = y + m * size.y_row + g * span, *z_at = z + m * size.z_row + g * span;
                    const T* given = dout + m * size.width + g * span;
                    const float* own = weight + g * span;
                    float *sum = sums + g * span, scale = inverse[m * size.groups + g], along = 0.0f;
#pragma omp simd reduction(+ : along)
                    for (int64_t i = 0; i < span; i++) {
                        float to = load(z_at[i]), s = sigmoid(to);
                        gate[i] = to * s;
                        slope[i] = s + gate[i] * (1.0f - s);
                        normed[i] = scale * (GATE_FIRST ? load(y_at[i]) * gate[i] : load(y_at[i]));
                        float reached = GATE_FIRST ? load(given[i]) : load(given[i]) * gate[i];
                        sum[i] += reached * normed[i];
                        along += reached * own[i] * normed[i];
                    }
                    float mean = along / span;
                    T *dy_at = dy + m * size.width + g * span, *dz_at = dz + m * size.width + g * span;
                    if (GATE_FIRST) {
#pragma omp simd
                        for (int64_t i = 0; i < span; i++) {
                            float inner = scale * (load(given[i]) * own[i] - normed[i] * mean);
                            dy_at[i] = stored<T>(inner * gate[i]);
                            dz_at[i] = stored<T>(inner * load(y_at[i]) * slope[i]);
                        }
                    } else {
#pragma omp simd
                        for (int64_t i = 0; i < span; i++) {
                            float weighted = load(given[i]) * own[i];
                            dy_at[i] = stored<T>(scale * (weighted * gate[i] - normed[i] * mean));
                            dz_at[i] = stored<T>(weighted * normed[i] * slope[i]);
                        }
                    }
                }
            }
        }
    }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                        \
    extern "C" void forward_##NAME(const T* y, const T* z, const float* weight, T* out, float* inverse, int64_t rows,          \
                                   int64_t width, int64_t groups, int64_t y_row, int64_t z_row, int64_t gate_first, float eps, \
                                   int64_t threads) {                                                                          \
        auto run = gate_first ? forward<T, true> : forward<T, false>;                                                          \
        run(y, z, weight, out, inverse, {rows, width, groups, y_row, z_row}, eps, threads);                                    \
    }                                                                                                                          \
    extern "C" void backward_##NAME(const T* dout, const T* y, const T* z, const float* weight, const float* inverse, T* dy,   \
                                    T* dz, float* dweight, int64_t rows, int64_t width, int64_t groups, int64_t y_row,         \
                                    int64_t z_row, int64_t gate_first, int64_t threads) {                                      \
        auto run = gate_first ? backward<T, true> : backward<T, false>;                                                        \
        run(dout, y, z, weight, inverse, dy, dz, dweight, {rows, width, groups, y_row, z_row}, threads);                       \
    }                                                                                                                          \
    extern "C" int64_t parts_##NAME() { return PARTS; }
EXPORT(float, f32)
EXPORT(bf16, bf16)
