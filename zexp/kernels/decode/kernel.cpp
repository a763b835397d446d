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
constexpr int64_t AHEAD = 8192;        // bytes between what is read and what is asked for
constexpr int64_t TOGETHER = 4;        // rows that are multiplied at a time: as many sums that do not wait for each other

inline int workers(int64_t bytes, int64_t threads) { return bytes < ALONE ? 1 : int(threads); }

constexpr int64_t LANES = 16;
constexpr int64_t PIECE = 4 * LANES;  // of a row, after which memory further ahead is asked for

typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));

inline Lanes lanes(const float* from) {
    Lanes x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline Lanes lanes(const bf16* from) {
    typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t))));
    typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t))));
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Lanes)(__builtin_convertvector(halves, Words) << 16);
}

// By halves, which do not wait for each other.
inline float sum(Lanes x) {
    typedef float Half __attribute__((vector_size(LANES / 2 * sizeof(float))));
    typedef float Quarter __attribute__((vector_size(LANES / 4 * sizeof(float))));
    Half halves[2];
    std::memcpy(halves, &x, sizeof x);
    halves[0] += halves[1];
    Quarter quarters[2];
    std::memcpy(quarters, halves, sizeof quarters);
    quarters[0] += quarters[1];
    return (quarters[0][0] + quarters[0][1]) + (quarters[0][2] + quarters[0][3]);
}

// Asks for a piece of memory that is read a little later: four rows of 1 KB side by side are so read at 19 GB/s of 7, where they
// come from the third cache.
template <class T>
inline void ask(const T* from) {
    const char* at = reinterpret_cast<const char*>(from) + AHEAD;
    for (int64_t i = 0; i < int64_t(PIECE * sizeof(T)); i += 64) __builtin_prefetch(at + i);
}

// Products of x with four rows that begin `row` elements apart. FIRST: of those that read these rows, it asks for what comes then.
template <bool FIRST, class T>
inline void products(float* out, const T* rows, int64_t row, const float* x, int64_t count) {
    const T *first = rows, *second = rows + row, *third = rows + 2 * row, *fourth = rows + 3 * row;
    Lanes a{}, b{}, c{}, d{};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        if (FIRST && i % PIECE == 0) ask(first + i), ask(second + i), ask(third + i), ask(fourth + i);
        Lanes own = lanes(x + i);
        a += lanes(first + i) * own;
        b += lanes(second + i) * own;
        c += lanes(third + i) * own;
        d += lanes(fourth + i) * own;
    }
    out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
    for (; i < count; i++) {
        out[0] += load(first[i]) * x[i];
        out[1] += load(second[i]) * x[i];
        out[2] += load(third[i]) * x[i];
        out[3] += load(fourth[i]) * x[i];
    }
}

template <class T>
inline float product(const T* row, const float* x, int64_t count) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) sum += load(row[i]) * x[i];
    return sum;
}

// Adds to sum four rows that begin `row` elements apart, each times its weight.
template <bool FIRST, class T>
inline void add_products(float* sum, const T* rows, int64_t row, const float* weights, int64_t count) {
    const T *first = rows, *second = rows + row, *third = rows + 2 * row, *fourth = rows + 3 * row;
    float a = weights[0], b = weights[1], c = weights[2], d = weights[3];
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        if (FIRST && i % PIECE == 0) ask(first + i), ask(second + i), ask(third + i), ask(fourth + i);
        Lanes own = lanes(sum + i);
        own += a * lanes(first + i);
        own += b * lanes(second + i);
        own += c * lanes(third + i);
        own += d * lanes(fourth + i);
        std::memcpy(sum + i, &own, sizeof own);
    }
    for (; i < count; i++) sum[i] += a * load(first[i]) + b * load(second[i]) + c * load(third[i]) + d * load(fourth[i]);
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
        for (int64_t m = 0; m < count; m++) {
            const float* own = given.data() + m * inputs;
            if (last - first == TOGETHER && m == 0)
                products<true>(sums, weight + first * inputs, inputs, own, inputs);
            else if (last - first == TOGETHER)
                products<false>(sums, weight + first * inputs, inputs, own, inputs);
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
                    products<true>(&weights[g * J * BLOCK + s], rows, size.k_row, &query[g * J * P], P);
                    for (int64_t h = g * J + 1; h < (g + 1) * J; h++)
                        products<false>(&weights[h * BLOCK + s], rows, size.k_row, &query[h * P], P);
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
                    add_products<true>(&sums[(place + g * J) * P], rows, size.v_row, &weights[g * J * BLOCK + s], P);
                    for (int64_t h = g * J + 1; h < (g + 1) * J; h++)
                        add_products<false>(&sums[(place + h) * P], rows, size.v_row, &weights[h * BLOCK + s], P);
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

// out (C) = bias + the sum over K of tail (K, C) times weight (C, K).
template <class T, class W>
void mixed(float* out, const T* tail, const W* weight, const W* bias, int64_t channels, int64_t width) {
    for (int64_t c = 0; c < channels; c++) out[c] = bias == nullptr ? 0.0f : load(bias[c]);
    if (width == 4) {  // what most models have: of four weights side by side a compiler makes vectors
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) {
            const W* taps = weight + 4 * c;
            float sum = out[c];
            sum += load(tail[c]) * load(taps[0]);
            sum += load(tail[c + channels]) * load(taps[1]);
            sum += load(tail[c + 2 * channels]) * load(taps[2]);
            out[c] = sum + load(tail[c + 3 * channels]) * load(taps[3]);
        }
        return;
    }
    for (int64_t k = 0; k < width; k++) {
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) out[c] += load(tail[k * channels + c]) * load(weight[c * width + k]);
    }
}

inline void to_silu(float* x, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) x[i] *= sigmoid(x[i]);
}

// The last K inputs (K, C) after x (C), from those before, which may be the same memory.
template <class T>
void shift(T* after, const T* before, const T* x, int64_t channels, int64_t width) {
    std::memmove(after, before + channels, (width - 1) * channels * sizeof(T));
    std::memcpy(after + (width - 1) * channels, x, channels * sizeof(T));
}

// y (B, C) and the last K inputs then, (B, K, C), from those before, `tail`, and x (B, C), sequences `row` elements apart.
// weight (C, K).
template <class T>
void convolve(const T* x, const float* weight, const float* bias, const T* tail, T* y, T* last, int64_t batch, int64_t channels,
              int64_t width, int64_t row, bool silu) {
    std::vector<float> sums(channels);
    for (int64_t b = 0; b < batch; b++) {
        T *own = last + b * width * channels, *to = y + b * channels;
        shift(own, tail + b * width * channels, x + b * row, channels, width);
        mixed(sums.data(), own, weight, bias, channels, width);
        if (silu) to_silu(sums.data(), channels);
        for (int64_t c = 0; c < channels; c++) to[c] = stored<T>(sums[c]);
    }
}

struct State {
    int64_t batch, heads, width, groups, size;
    int64_t x_row, b_row, c_row;  // elements from one sequence to the next
};

// y (B, H, P) and the state after it, (B, G, N, J P), from the state before, which may be the same memory. x (B, H, P), b and c
// (B, G, N). Threads take heads of a group each.
template <class T>
void advance(const State& of, const T* x, const float* dt, const float* a, const T* b, const T* c, const float* d,
             const float* state, T* y, float* after, int64_t threads) {
    int64_t J = of.heads / of.groups, P = of.width, inner = J * P;
    int use = workers(of.batch * of.heads * P * of.size * 8, threads);
    int64_t share = (J + use - 1) / use, parts = (J + share - 1) / share;
#pragma omp parallel for collapse(3) num_threads(use)
    for (int64_t s = 0; s < of.batch; s++) {
        for (int64_t g = 0; g < of.groups; g++) {
            for (int64_t part = 0; part < parts; part++) {
                int64_t first = part * share, heads = std::min(share, J - first), count = heads * P;
                std::vector<float> kept(count), added(count), read(count, 0.0f);
                const T* own = x + s * of.x_row + g * inner + first * P;
                for (int64_t j = 0; j < heads; j++) {
                    int64_t h = g * J + first + j;
                    float step = dt[s * of.heads + h], left = exp(step * a[h]);
                    for (int64_t p = j * P; p < (j + 1) * P; p++) {
                        kept[p] = left;
                        added[p] = load(own[p]) * step;
                    }
                }
                const float *left = kept.data(), *written = added.data();
                float* sum = read.data();
                for (int64_t n = 0; n < of.size; n++) {
                    int64_t place = ((s * of.groups + g) * of.size + n) * inner + first * P;
                    float in = load(b[s * of.b_row + g * of.size + n]), out = load(c[s * of.c_row + g * of.size + n]);
                    const float* from = state + place;
                    float* to = after + place;
#pragma omp simd
                    for (int64_t p = 0; p < count; p++) {
                        float value = from[p] * left[p] + in * written[p];
                        to[p] = value;
                        sum[p] += out * value;
                    }
                }
                T* to = y + (s * of.groups + g) * inner + first * P;
                for (int64_t j = 0; j < heads; j++) {
                    float direct = d[g * J + first + j];
                    for (int64_t p = j * P; p < (j + 1) * P; p++) to[p] = stored<T>(sum[p] + load(own[p]) * direct);
                }
            }
        }
    }
}

// out = the norm of `count` numbers y and their gate: of y silu(z), or of y and then times silu(z).
template <class T>
void gated_norm(T* out, const float* y, const T* z, const T* weight, int64_t count, float eps, bool norm_first) {
    std::vector<float> gates(count), values(count);
    float *gate = gates.data(), *value = values.data(), squares = 0.0f;
    floats(gate, z, count);
    to_silu(gate, count);
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < count; i++) {
        value[i] = norm_first ? y[i] : y[i] * gate[i];
        squares += value[i] * value[i];
    }
    float scale = 1.0f / std::sqrt(squares / count + eps);
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        float normed = value[i] * scale * load(weight[i]);
        out[i] = stored<T>(norm_first ? normed * gate[i] : normed);
    }
}

struct Mamba2 {
    int64_t batch, row, heads, width, groups, size, conv_width;  // row: elements of `projected` from one sequence to the next
    bool norm_first;
    float dt_min, dt_max, eps;
};

// out (B, I) of projected (B, row), which holds z (I), what the convolution sees (I + 2 G N) and dt (H), I = H P. conv (B, K, C)
// and state (B, G, N, J P) go one position on.
template <class T>
void mamba2(const Mamba2& of, const T* projected, const T* conv_weight, const T* conv_bias, const T* dt_bias, const T* a_log,
            const T* d, const T* norm, T* conv, float* state, T* out, int64_t threads) {
    int64_t inner = of.heads * of.width, shared = of.groups * of.size, channels = inner + 2 * shared, span = inner / of.groups;
    std::vector<float> seen(of.batch * channels), dt(of.batch * of.heads), a(of.heads), direct(of.heads), y(of.batch * inner);
    for (int64_t h = 0; h < of.heads; h++) a[h] = -std::exp(load(a_log[h]));
    floats(direct.data(), d, of.heads);
    for (int64_t b = 0; b < of.batch; b++) {
        const T *given = projected + b * of.row + inner, *steps = given + channels;
        T* tail = conv + b * of.conv_width * channels;
        float* own = seen.data() + b * channels;
        shift(tail, tail, given, channels, of.conv_width);
        mixed(own, tail, conv_weight, conv_bias, channels, of.conv_width);
        to_silu(own, channels);
        for (int64_t h = 0; h < of.heads; h++) {
            float x = load(steps[h]) + load(dt_bias[h]), step = x > 20.0f ? x : std::log1p(std::exp(x));
            dt[b * of.heads + h] = std::min(std::max(step, of.dt_min), of.dt_max);
        }
    }
    const float *x = seen.data(), *in = x + inner, *from = in + shared;
    State sizes{of.batch, of.heads, of.width, of.groups, of.size, channels, channels, channels};
    advance(sizes, x, dt.data(), a.data(), in, from, direct.data(), state, y.data(), state, threads);
    for (int64_t b = 0; b < of.batch; b++)
        for (int64_t i = 0; i < inner; i += span)
            gated_norm(out + b * inner + i, &y[b * inner + i], projected + b * of.row + i, norm + i, span, of.eps, of.norm_first);
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
        advance({batch, heads, width, groups, size, x_row, b_row, c_row}, x, dt, a, b, c, d, state, y, after, threads);           \
    }                                                                                                                             \
    void mamba2_##NAME(const T* projected, const T* conv_weight, const T* conv_bias, const T* dt_bias, const T* a_log, const T* d,\
                       const T* norm, T* conv, float* state, T* out, int64_t batch, int64_t row, int64_t heads, int64_t width,    \
                       int64_t groups, int64_t size, int64_t conv_width, int64_t norm_first, float dt_min, float dt_max,          \
                       float eps, int64_t threads) {                                                                              \
        Mamba2 of{batch, row, heads, width, groups, size, conv_width, norm_first != 0, dt_min, dt_max, eps};                      \
        mamba2(of, projected, conv_weight, conv_bias, dt_bias, a_log, d, norm, conv, state, out, threads);                        \
    }                                                                                                                             \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
