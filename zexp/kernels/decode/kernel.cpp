// One token further: products of a few rows with a matrix, a query against cached keys, one step of a convolution and of a
// state. All of them read much and compute little, so each reads its memory once, in its order, and several rows at a time.
//
// B batch, S positions, H query heads, G key-value heads or groups, J = H / G heads of one, P head width, C channels, K conv
// width, N state size, I inputs, O outputs.
#include "vector.h"

using namespace zexp;

namespace {

constexpr int64_t BLOCK = 256;         // positions of a block, whatever the number of threads
constexpr int64_t ALONE = 1 << 21;     // bytes that one thread has read before a second is awake
constexpr int64_t AHEAD = 2048;        // bytes between what is read and what is asked for, of a matrix
constexpr int64_t FAR_AHEAD = 8192;    // of a cache, which is asked for in smaller pieces
constexpr int64_t TOGETHER = 4;        // rows that are multiplied at a time: as many sums that do not wait for each other

inline int workers(int64_t bytes, int64_t threads) { return bytes < ALONE ? 1 : int(threads); }

// Products of x with four rows that begin `row` elements apart.
template <class T>
inline void products(float* out, const T* rows, int64_t row, const float* x, int64_t count) {
    const T *first = rows, *second = rows + row, *third = rows + 2 * row, *fourth = rows + 3 * row;
    float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int64_t i = 0; i < count; i++) {
        a += load(first[i]) * x[i];
        b += load(second[i]) * x[i];
        c += load(third[i]) * x[i];
        d += load(fourth[i]) * x[i];
    }
    out[0] = a, out[1] = b, out[2] = c, out[3] = d;
}

template <class T>
inline float product(const T* row, const float* x, int64_t count) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) sum += load(row[i]) * x[i];
    return sum;
}

// Adds to sum four rows that begin `row` elements apart, each times its weight.
template <class T>
inline void add_products(float* sum, const T* rows, int64_t row, const float* weights, int64_t count) {
    const T *first = rows, *second = rows + row, *third = rows + 2 * row, *fourth = rows + 3 * row;
    float a = weights[0], b = weights[1], c = weights[2], d = weights[3];
#pragma omp simd
    for (int64_t i = 0; i < count; i++) sum[i] += a * load(first[i]) + b * load(second[i]) + c * load(third[i]) + d * load(fourth[i]);
}

// Asks for memory that is read a little later: of rows of 1 KB side by side this makes 21 GB/s of 7.
inline void ask(const void* from, int64_t bytes, int64_t ahead = AHEAD) {
    const char* at = static_cast<const char*>(from) + ahead;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
}

template <class T>
void floats(float* out, const T* from, int64_t count, float scale = 1.0f) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) out[i] = load(from[i]) * scale;
}

// y (rows, O) = x (rows, I) W^T + bias; W (O, I).
template <class T>
void linear(const T* x, const T* weight, const T* bias, T* y, int64_t count, int64_t inputs, int64_t outputs, int64_t threads) {
    std::vector<float> given(count * inputs);
    floats(given.data(), x, count * inputs);
#pragma omp parallel for num_threads(workers(inputs * outputs * sizeof(T), threads))
    for (int64_t part = 0; part < (outputs + TOGETHER - 1) / TOGETHER; part++) {
        int64_t first = part * TOGETHER, last = std::min(first + TOGETHER, outputs);
        float sums[TOGETHER];
        ask(weight + first * inputs, TOGETHER * inputs * sizeof(T));
        for (int64_t m = 0; m < count; m++) {
            const float* own = given.data() + m * inputs;
            if (last - first == TOGETHER)
                products(sums, weight + first * inputs, inputs, own, inputs);
            else
                for (int64_t o = first; o < last; o++) sums[o - first] = product(weight + o * inputs, own, inputs);
            for (int64_t o = first; o < last; o++)
                y[m * outputs + o] = stored<T>(sums[o - first] + (bias == nullptr ? 0.0f : load(bias[o])));
        }
    }
}

struct Keys {
    int64_t batch, length, heads, groups, width;
    int64_t k_sequence, k_row, v_sequence, v_row;  // elements from one sequence, or position, to the next
};

// out (B, H, P): of one query a sequence, which sees every key. q (B, H, P). Blocks of positions are read by themselves, and
// what they say is weighed by their largest scores.
template <class T>
void attend(const Keys& size, const T* q, const T* k, const T* v, T* out, float scale, int64_t threads) {
    int64_t H = size.heads, G = size.groups, J = H / G, P = size.width, blocks = (size.length + BLOCK - 1) / BLOCK;
    std::vector<float> largest(size.batch * blocks * H), totals(size.batch * blocks * H), sums(size.batch * blocks * H * P, 0.0f);
    int use = workers(2 * size.batch * size.length * G * P * sizeof(T), threads);
#pragma omp parallel for collapse(2) num_threads(use)
    for (int64_t b = 0; b < size.batch; b++) {
        for (int64_t block = 0; block < blocks; block++) {
            int64_t first = block * BLOCK, count = std::min(BLOCK, size.length - first);
            std::vector<float> query(H * P), weights(H * BLOCK);
            floats(query.data(), q + b * H * P, H * P, scale);
            const T *keys = k + b * size.k_sequence + first * size.k_row, *values = v + b * size.v_sequence + first * size.v_row;
            int64_t whole = count / TOGETHER * TOGETHER;
            for (int64_t s = 0; s < whole; s += TOGETHER) {  // all heads of some positions, then the next: in the order of memory
                for (int64_t g = 0; g < G; g++) {
                    const T* rows = keys + s * size.k_row + g * P;
                    for (int64_t r = 0; r < TOGETHER; r++) ask(rows + r * size.k_row, P * sizeof(T), FAR_AHEAD);
                    for (int64_t h = g * J; h < (g + 1) * J; h++)
                        products(&weights[h * BLOCK + s], rows, size.k_row, &query[h * P], P);
                }
            }
            for (int64_t s = whole; s < count; s++)
                for (int64_t h = 0; h < H; h++)
                    weights[h * BLOCK + s] = product(keys + s * size.k_row + h / J * P, &query[h * P], P);
            int64_t place = (b * blocks + block) * H;
            for (int64_t h = 0; h < H; h++) {
                float *own = &weights[h * BLOCK], most = own[0], total = 0.0f;
#pragma omp simd reduction(max : most)
                for (int64_t s = 0; s < count; s++) most = std::max(most, own[s]);
#pragma omp simd reduction(+ : total)
                for (int64_t s = 0; s < count; s++) {
                    own[s] = exp(own[s] - most);
                    total += own[s];
                }
                largest[place + h] = most, totals[place + h] = total;
            }
            for (int64_t s = 0; s < whole; s += TOGETHER) {
                for (int64_t g = 0; g < G; g++) {
                    const T* rows = values + s * size.v_row + g * P;
                    for (int64_t r = 0; r < TOGETHER; r++) ask(rows + r * size.v_row, P * sizeof(T), FAR_AHEAD);
                    for (int64_t h = g * J; h < (g + 1) * J; h++)
                        add_products(&sums[(place + h) * P], rows, size.v_row, &weights[h * BLOCK + s], P);
                }
            }
            for (int64_t s = whole; s < count; s++) {
                for (int64_t h = 0; h < H; h++) {
                    const T* row = values + s * size.v_row + h / J * P;
                    float *sum = &sums[(place + h) * P], w = weights[h * BLOCK + s];
#pragma omp simd
                    for (int64_t p = 0; p < P; p++) sum[p] += w * load(row[p]);
                }
            }
        }
    }
    for (int64_t b = 0; b < size.batch; b++) {
        for (int64_t h = 0; h < H; h++) {
            float most = largest[b * blocks * H + h], total = 0.0f;
            std::vector<float> joined(P, 0.0f);
            for (int64_t block = 1; block < blocks; block++) most = std::max(most, largest[(b * blocks + block) * H + h]);
            for (int64_t block = 0; block < blocks; block++) {
                int64_t place = (b * blocks + block) * H + h;
                float share = exp(largest[place] - most);
                total += totals[place] * share;
                const float* sum = &sums[place * P];
                float* to = joined.data();
#pragma omp simd
                for (int64_t p = 0; p < P; p++) to[p] += sum[p] * share;
            }
            float inverse = 1.0f / total;
            T* to = out + (b * H + h) * P;
            const float* from = joined.data();
#pragma omp simd
            for (int64_t p = 0; p < P; p++) to[p] = stored<T>(from[p] * inverse);
        }
    }
}

// y (B, C) and the last K inputs then, (B, K, C), from those before, `tail`, and x (B, C), sequences `row` elements apart.
// weight (C, K).
template <class T>
void convolve(const T* x, const float* weight, const float* bias, const T* tail, T* y, T* last, int64_t batch, int64_t channels,
              int64_t width, int64_t row, bool silu) {
    std::vector<float> sums(channels);
    float* sum = sums.data();
    for (int64_t b = 0; b < batch; b++) {
        T* own = last + b * width * channels;
        std::memcpy(own, tail + (b * width + 1) * channels, (width - 1) * channels * sizeof(T));
        std::memcpy(own + (width - 1) * channels, x + b * row, channels * sizeof(T));
        for (int64_t c = 0; c < channels; c++) sum[c] = bias == nullptr ? 0.0f : bias[c];
        for (int64_t k = 0; k < width; k++) {
            const T* from = own + k * channels;
            const float* tap = weight + k;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) sum[c] += load(from[c]) * tap[c * width];
        }
        T* to = y + b * channels;
        if (silu) {
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) to[c] = stored<T>(sum[c] * sigmoid(sum[c]));
        } else {
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) to[c] = stored<T>(sum[c]);
        }
    }
}

// y (B, H, P) and the state after it, (B, G, N, J P), from the state before. x (B, H, P), b and c (B, G, N): sequences their
// strides apart.
template <class T>
void advance(const T* x, const float* dt, const float* a, const T* b, const T* c, const float* d, const float* state, T* y,
             float* after, int64_t batch, int64_t heads, int64_t width, int64_t groups, int64_t size, int64_t x_row, int64_t b_row,
             int64_t c_row, int64_t threads) {
    int64_t J = heads / groups, inner = J * width;
#pragma omp parallel for collapse(2) num_threads(workers(batch * groups * size * inner * 8, threads))
    for (int64_t s = 0; s < batch; s++) {
        for (int64_t g = 0; g < groups; g++) {
            std::vector<float> kept(inner), added(inner), read(inner, 0.0f);
            const T* own = x + s * x_row + g * inner;
            for (int64_t j = 0; j < J; j++) {
                float step = dt[s * heads + g * J + j], left = exp(step * a[g * J + j]);
                for (int64_t p = j * width; p < (j + 1) * width; p++) {
                    kept[p] = left;
                    added[p] = load(own[p]) * step;
                }
            }
            const float *left = kept.data(), *written = added.data();
            float* sum = read.data();
            for (int64_t n = 0; n < size; n++) {
                int64_t place = ((s * groups + g) * size + n) * inner;
                float in = load(b[s * b_row + g * size + n]), out = load(c[s * c_row + g * size + n]);
                const float* from = state + place;
                float* to = after + place;
#pragma omp simd
                for (int64_t p = 0; p < inner; p++) {
                    float value = from[p] * left[p] + in * written[p];
                    to[p] = value;
                    sum[p] += out * value;
                }
            }
            T* to = y + (s * groups + g) * inner;
            for (int64_t j = 0; j < J; j++) {
                float direct = d[g * J + j];
                for (int64_t p = j * width; p < (j + 1) * width; p++) to[p] = stored<T>(sum[p] + load(own[p]) * direct);
            }
        }
    }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                           \
    extern "C" {                                                                                                                  \
    void linear_##NAME(const T* x, const T* weight, const T* bias, T* y, int64_t count, int64_t inputs, int64_t outputs,          \
                       int64_t threads) {                                                                                         \
        linear(x, weight, bias, y, count, inputs, outputs, threads);                                                              \
    }                                                                                                                             \
    void attend_##NAME(const T* q, const T* k, const T* v, T* out, int64_t batch, int64_t length, int64_t heads, int64_t groups,  \
                       int64_t width, int64_t k_sequence, int64_t k_row, int64_t v_sequence, int64_t v_row, float scale,          \
                       int64_t threads) {                                                                                         \
        attend({batch, length, heads, groups, width, k_sequence, k_row, v_sequence, v_row}, q, k, v, out, scale, threads);        \
    }                                                                                                                             \
    void convolve_##NAME(const T* x, const float* weight, const float* bias, const T* tail, T* y, T* last, int64_t batch,         \
                         int64_t channels, int64_t width, int64_t row, int64_t silu, int64_t) {                                   \
        convolve(x, weight, bias, tail, y, last, batch, channels, width, row, silu);                                              \
    }                                                                                                                             \
    void advance_##NAME(const T* x, const float* dt, const float* a, const T* b, const T* c, const float* d, const float* state,  \
                        T* y, float* after, int64_t batch, int64_t heads, int64_t width, int64_t groups, int64_t size,            \
                        int64_t x_row, int64_t b_row, int64_t c_row, int64_t threads) {                                           \
        advance(x, dt, a, b, c, d, state, y, after, batch, heads, width, groups, size, x_row, b_row, c_row, threads);             \
    }                                                                                                                             \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
