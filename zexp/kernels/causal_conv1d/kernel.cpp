// Causal depthwise convolution over (batch, time, channel), with SiLU or without, and its gradient.
//
// B batch, T positions, C channels, K conv width. A block of channels passes through time with the sums of K positions in the
// cache. What SiLU was taken of is computed again in the backward pass: x is all that is kept.
#include "vector.h"

using namespace zexp;

namespace {

constexpr int64_t BLOCK = 256;  // channels of a block

struct Sizes {
    int64_t batch, length, channels, width;
    int64_t row, sequence;  // elements from one position of x to the next, and from one sequence
};

// Positions before t that its convolution reads: at most K - 1, none of another document (ids of the row; null: all one).
inline int64_t reach(const int64_t* ids, int64_t t, int64_t width) {
    int64_t s = 1;
    while (s < width && s <= t && (ids == nullptr || ids[t - s] == ids[t])) s++;
    return s;
}

template <class T>
void convolve(float* sum, const T* x, const float* taps, const float* bias, Sizes size, int64_t reached, int64_t count) {
    for (int64_t c = 0; c < count; c++) sum[c] = bias == nullptr ? 0.0f : bias[c];
    for (int64_t s = 0; s < reached; s++) {
        const T* from = x - s * size.row;
        const float* tap = taps + (size.width - 1 - s) * size.channels;
#pragma omp simd
        for (int64_t c = 0; c < count; c++) sum[c] += load(from[c]) * tap[c];
    }
}

// x as its sizes say; taps (K, C); y (B, T, C).
template <class T>
void forward(const T* x, const float* taps, const float* bias, const int64_t* ids, T* y, Sizes size, bool silu, int threads) {
    int64_t blocks = (size.channels + BLOCK - 1) / BLOCK;
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t b = 0; b < size.batch; b++) {
        for (int64_t block = 0; block < blocks; block++) {
            int64_t first = block * BLOCK, count = std::min(BLOCK, size.channels - first);
            const int64_t* row_ids = ids == nullptr ? nullptr : ids + b * size.length;
            float sum[BLOCK];
            for (int64_t t = 0; t < size.length; t++) {
                const T* at = x + b * size.sequence + t * size.row + first;
                T* out = y + (b * size.length + t) * size.channels + first;
                convolve(sum, at, taps + first, bias == nullptr ? nullptr : bias + first, size, reach(row_ids, t, size.width), count);
                if (silu) {
#pragma omp simd
                    for (int64_t c = 0; c < count; c++) out[c] = stored<T>(sum[c] * sigmoid(sum[c]));
                } else {
#pragma omp simd
                    for (int64_t c = 0; c < count; c++) out[c] = stored<T>(sum[c]);
                }
            }
        }
    }
}

// dy (B, T, C); dx (B, T, C); dtaps (B, K, C) and dbias (B, C): each sequence's own.
template <class T>
void backward(const T* dy, const T* x, const float* taps, const float* bias, const int64_t* ids, T* dx, float* dtaps, float* dbias,
              Sizes size, bool silu, int threads) {
    int64_t blocks = (size.channels + BLOCK - 1) / BLOCK;
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t b = 0; b < size.batch; b++) {
        for (int64_t block = 0; block < blocks; block++) {
            int64_t first = block * BLOCK, count = std::min(BLOCK, size.channels - first), width = size.width;
            const int64_t* row_ids = ids == nullptr ? nullptr : ids + b * size.length;
            float grad[BLOCK];
            std::vector<float> waiting(width * BLOCK, 0.0f);  // gradients of the last K positions of x, a ring
            float* own_dbias = dbias + b * size.channels + first;
            for (int64_t c = 0; c < count; c++) own_dbias[c] = 0.0f;
            for (int64_t k = 0; k < width; k++)
                for (int64_t c = 0; c < count; c++) dtaps[(b * width + k) * size.channels + first + c] = 0.0f;
            for (int64_t t = 0; t < size.length + width - 1; t++) {
                float* newest = waiting.data() + t % width * BLOCK;
                if (t < size.length) {
                    const T* at = x + b * size.sequence + t * size.row + first;
                    const T* given = dy + (b * size.length + t) * size.channels + first;
                    int64_t reached = reach(row_ids, t, width);
                    if (silu) {
                        convolve(grad, at, taps + first, bias == nullptr ? nullptr : bias + first, size, reached, count);
#pragma omp simd
                        for (int64_t c = 0; c < count; c++) {
                            float s = sigmoid(grad[c]);
                            grad[c] = load(given[c]) * (s + grad[c] * s * (1.0f - s));
                        }
                    } else {
#pragma omp simd
                        for (int64_t c = 0; c < count; c++) grad[c] = load(given[c]);
                    }
#pragma omp simd
                    for (int64_t c = 0; c < count; c++) own_dbias[c] += grad[c];
                    for (int64_t c = 0; c < count; c++) newest[c] = 0.0f;
                    for (int64_t s = 0; s < reached; s++) {
                        const float* tap = taps + (width - 1 - s) * size.channels + first;
                        float* dtap = dtaps + (b * width + width - 1 - s) * size.channels + first;
                        const T* from = at - s * size.row;
                        float* to = waiting.data() + (t - s) % width * BLOCK;
#pragma omp simd
                        for (int64_t c = 0; c < count; c++) {
                            to[c] += grad[c] * tap[c];
                            dtap[c] += grad[c] * load(from[c]);
                        }
                    }
                }
                int64_t done = t - (width - 1);  // no later position reads this one
                if (done < 0 || done >= size.length) continue;
                const float* oldest = waiting.data() + done % width * BLOCK;
                T* out = dx + (b * size.length + done) * size.channels + first;
#pragma omp simd
                for (int64_t c = 0; c < count; c++) out[c] = stored<T>(oldest[c]);
            }
        }
    }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                        \
    extern "C" void forward_##NAME(const T* x, const float* taps, const float* bias, const int64_t* ids, T* y, int64_t batch,  \
                                   int64_t length, int64_t channels, int64_t width, int64_t row, int64_t sequence,             \
                                   int64_t silu, int64_t threads) {                                                            \
        forward(x, taps, bias, ids, y, {batch, length, channels, width, row, sequence}, silu, threads);                        \
    }                                                                                                                          \
    extern "C" void backward_##NAME(const T* dy, const T* x, const float* taps, const float* bias, const int64_t* ids, T* dx,  \
                                    float* dtaps, float* dbias, int64_t batch, int64_t length, int64_t channels,               \
                                    int64_t width, int64_t row, int64_t sequence, int64_t silu, int64_t threads) {             \
        backward(dy, x, taps, bias, ids, dx, dtaps, dbias, {batch, length, channels, width, row, sequence}, silu, threads);    \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
