// The selective scan of Mamba-1 over (batch, time, channel), and its gradient.
//
// B batch · T positions · I inner channels · H heads · P channels of a head (I / H) · N state size · M segments of positions
//
// A tile of channels lies side by side in a vector. It goes through a segment of positions with four of its N rates at a time,
// whose states stay in registers: a decay is computed where it is used. The state that enters a segment is kept; the backward pass
// computes the segment's states and decays again, into arrays that stay in the cache, and goes back through them.
//
// Gradients of B and C are sums over channels: each lane of a vector sums its own ones of a block of channels, the lanes are added
// once a segment, and the blocks in their order, whatever thread computed them.
#include "vector.h"

#include <memory>

using namespace zexp;

namespace {

// Vectors as the compiler knows them: it finds none in loops over rates and lanes whose sums must stay in registers.
constexpr int64_t LANES = 16;  // channels of a tile
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));

constexpr int64_t RATES = 4;        // that are computed together
constexpr int64_t MOST_TILES = 16;  // of a block: the fewer, the more sums of lanes
constexpr float LOG2_E = 1.44269504f;

struct Sizes {
    int64_t batch, length, heads, width, state;  // B, T, H, P, N
    int64_t b_sequence, b_row, b_head;           // elements of B between sequences, positions and heads
    int64_t c_sequence, c_row, c_head;
    int64_t z_sequence, z_row;
    int64_t segment;                             // positions between two kept states

    int64_t channels() const { return heads * width; }
    int64_t segments() const { return (length + segment - 1) / segment; }
    int64_t groups() const { return (state + RATES - 1) / RATES; }  // of rates
    // Channels that one task computes: half a head where that is not too much, so that one row gives two threads work.
    int64_t block() const { return LANES * std::min(MOST_TILES, (width + 2 * LANES - 1) / (2 * LANES)); }
    int64_t blocks() const { return (width + block() - 1) / block(); }  // of a head
    int64_t parts() const { return batch * heads * blocks(); }
};

// 2^u to 2 ulp, for u below 128: 2^n 2^f with |f| <= 1/2, 2^f by a polynomial of least relative error that is 1 at 0, so that what
// hardly decays does not grow. Below -126 it is 0, of -infinity too.
inline lanes exp2(lanes u) {
    const float shift = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
    lanes shifted = u + shift;
    lanes f = u - (shifted - shift);
    lanes p = f * 1.32647273e-3f + 9.67151299e-3f;
    p = p * f + 5.55073358e-2f;
    p = p * f + 2.40222424e-1f;
    p = p * f + 6.93147004e-1f;
    p = p * f + 1.0f;
    bits made = (bits)p + ((bits)shifted << 23);  // n is in the lowest bits of shifted
    return (lanes)(u < -126.0f ? bits{} : made);
}

inline float sum_of(const lanes& x) {
    float half[LANES / 2], sum = 0.0f;
    for (int64_t l = 0; l < LANES / 2; l++) half[l] = x[l] + x[l + LANES / 2];
    for (int64_t l = 0; l < LANES / 2; l += 2) sum += half[l] + half[l + 1];
    return sum;
}

// log(1 + e^x): with z = e^-|x|, log(1 + z) = 2 artanh(z / (2 + z)), by its series up to the 13th power.
inline float softplus(float x) {
    float z = zexp::exp(x < 0.0f ? x : -x), s = z / (2.0f + z), q = s * s;
    float p = 1.0f / 13.0f;
    p = p * q + 1.0f / 11.0f;
    p = p * q + 1.0f / 9.0f;
    p = p * q + 1.0f / 7.0f;
    p = p * q + 1.0f / 5.0f;
    p = p * q + 1.0f / 3.0f;
    p = p * q + 1.0f;
    return (x < 0.0f ? 0.0f : x) + 2.0f * s * p;
}

// A tile's channels, lanes beyond `count` zero.
template <class T>
inline lanes fetched(const T* from, int64_t count) {
    float to[LANES] = {};
    if (count == LANES) {
#pragma omp simd
        for (int64_t l = 0; l < LANES; l++) to[l] = load(from[l]);
    } else {
        for (int64_t l = 0; l < count; l++) to[l] = load(from[l]);
    }
    lanes row;
    std::memcpy(&row, to, sizeof row);
    return row;
}

template <class T>
inline void put(T* to, lanes row, int64_t count) {
    float from[LANES];
    std::memcpy(from, &row, sizeof row);
    if (count == LANES) {
#pragma omp simd
        for (int64_t l = 0; l < LANES; l++) to[l] = stored<T>(from[l]);
    } else {
        for (int64_t l = 0; l < count; l++) to[l] = stored<T>(from[l]);
    }
}

template <float (*F)(float)>
inline lanes each(lanes row) {
    float at[LANES];
    std::memcpy(at, &row, sizeof row);
#pragma omp simd
    for (int64_t l = 0; l < LANES; l++) at[l] = F(at[l]);
    std::memcpy(&row, at, sizeof row);
    return row;
}

// x and y (B, T, I) and B and C in T, dt (B, T, I) in S; a (I, N), d (I); bias (I) or null: dt is softplus of what is given, with
// the bias; z (B, T, I), or null: what is scanned is multiplied by silu(z); starts (B, T) or null: where a document starts.
template <class T, class S>
struct Inputs {
    const T* x;
    const S* dt;
    const float* a;
    const T *b, *c;
    const float *d, *bias;
    const T* z;
    const uint8_t* starts;
};

// A group of rates at one tile.
struct Group {
    lanes of[RATES];
};

// What one task computes: a block of channels of a head of a sequence.
struct Part {
    int64_t sequence, head, block;
    int64_t first, count, tiles;  // channels, counted among all

    Part(int64_t number, const Sizes& size) {
        sequence = number / size.blocks() / size.heads;
        head = number / size.blocks() % size.heads;
        block = number % size.blocks();
        first = head * size.width + block * size.block();
        count = std::min(size.block(), size.width - block * size.block());
        tiles = (count + LANES - 1) / LANES;
    }
    int64_t tile_count(int64_t tile) const { return std::min(LANES, count - tile * LANES); }
};

// The rates of a part, times log2(e): (tiles, groups).
std::vector<Group> rates_of(const float* a, const Part& part, const Sizes& size) {
    std::vector<Group> rates(part.tiles * size.groups(), Group{});
    for (int64_t i = 0; i < part.count; i++)
        for (int64_t n = 0; n < size.state; n++)
            rates[i / LANES * size.groups() + n / RATES].of[n % RATES][i % LANES] = a[(part.first + i) * size.state + n] * LOG2_E;
    return rates;
}

// Of a segment: its positions, and B (writes) and C (reads), (groups, positions, RATES); a rate beyond N has zeros.
struct Segment {
    int64_t begin, length, row;  // its first position in the sequence, how many, and the first among those of all sequences
    std::vector<float> writes, reads;
    const uint8_t* start;

    explicit Segment(const Sizes& size) : writes(size.groups() * size.segment * RATES), reads(writes.size()) {}

    template <class T, class S>
    void enter(int64_t number, const Inputs<T, S>& given, const Part& part, const Sizes& size) {
        begin = number * size.segment;
        length = std::min(size.segment, size.length - begin);
        row = part.sequence * size.length + begin;
        start = given.starts == nullptr ? nullptr : given.starts + row;
        fetch(writes, given.b + part.sequence * size.b_sequence + begin * size.b_row + part.head * size.b_head, size.b_row, size);
        fetch(reads, given.c + part.sequence * size.c_sequence + begin * size.c_row + part.head * size.c_head, size.c_row, size);
    }
    bool starts(int64_t t) const { return start != nullptr && start[t]; }
    int64_t z_at(int64_t t, const Part& part, const Sizes& size) const {
        return part.sequence * size.z_sequence + (begin + t) * size.z_row;
    }

  private:
    template <class T>
    void fetch(std::vector<float>& to, const T* from, int64_t row_length, const Sizes& size) {
        for (int64_t t = 0; t < length; t++)
            for (int64_t n = 0; n < size.state; n++)
                to[(n / RATES * size.segment + t) * RATES + n % RATES] = load(from[t * row_length + n]);
    }
};

// A group of rates of a tile in the kept states, (B, M, N, I): copied there, or from there.
template <bool TO>
void copy_kept(float* kept, Group& state, int64_t segment, int64_t group, const Part& part, int64_t tile, const Sizes& size) {
    for (int64_t k = 0; k < RATES && group * RATES + k < size.state; k++) {
        int64_t row = (part.sequence * size.segments() + segment) * size.state + group * RATES + k;
        float* at = kept + row * size.channels() + part.first + tile * LANES;
        size_t bytes = part.tile_count(tile) * sizeof(float);
        if (TO)
            std::memcpy(at, &state.of[k], bytes);
        else
            std::memcpy(&state.of[k], at, bytes);
    }
}

template <class T, class S>
void forward_part(const Inputs<T, S>& given, T* y, float* kept, const Part& part, const Sizes& size) {
    std::vector<Group> rates = rates_of(given.a, part, size), states(rates.size(), Group{});
    std::vector<lanes> steps(size.segment), written(size.segment), sums(size.segment);
    Segment segment(size);
    for (int64_t number = 0; number < size.segments(); number++) {
        segment.enter(number, given, part, size);
        for (int64_t tile = 0; tile < part.tiles; tile++) {
            int64_t count = part.tile_count(tile), first = part.first + tile * LANES;
            lanes skip = fetched(given.d + first, count);
            lanes bias = given.bias == nullptr ? lanes{} : fetched(given.bias + first, count);
            for (int64_t t = 0; t < segment.length; t++) {
                int64_t at = (segment.row + t) * size.channels() + first;
                lanes x = fetched(given.x + at, count);
                steps[t] = fetched(given.dt + at, count);
                if (given.bias != nullptr) steps[t] = each<softplus>(steps[t] + bias);
                written[t] = x * steps[t];
                sums[t] = x * skip;
            }
            for (int64_t group = 0; group < size.groups(); group++) {
                Group& slot = states[tile * size.groups() + group];
                Group state = slot, rate = rates[tile * size.groups() + group];
                if (kept != nullptr) copy_kept<true>(kept, state, number, group, part, tile, size);
                const float* write = segment.writes.data() + group * size.segment * RATES;
                const float* read = segment.reads.data() + group * size.segment * RATES;
                for (int64_t t = 0; t < segment.length; t++) {
                    if (segment.starts(t)) state = Group{};
                    lanes sum = sums[t];
#pragma GCC unroll 4
                    for (int64_t k = 0; k < RATES; k++) {
                        state.of[k] = exp2(steps[t] * rate.of[k]) * state.of[k] + written[t] * write[t * RATES + k];
                        sum += state.of[k] * read[t * RATES + k];
                    }
                    sums[t] = sum;
                }
                slot = state;
            }
            for (int64_t t = 0; t < segment.length; t++) {
                if (given.z != nullptr) {
                    lanes z = fetched(given.z + segment.z_at(t, part, size) + first, count);
                    sums[t] *= z * each<sigmoid>(z);
                }
                put(y + (segment.row + t) * size.channels() + first, sums[t], count);
            }
        }
    }
}

template <class T, class S>
void forward(const Inputs<T, S>& given, T* y, float* kept, const Sizes& size, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t part = 0; part < size.parts(); part++) forward_part(given, y, kept, Part(part, size), size);
}

// dx, ddt, dz (B, T, I); da (B, I, N), dd and dbias (B, I): each sequence's own; db, dc (B, T, H, N).
template <class T, class S>
struct Gradients {
    T* dx;
    S* ddt;
    float* da;
    T *db, *dc;
    float *dd, *dbias;
    T* dz;
};

// The arrays of a segment of a tile in the backward pass.
struct Room {
    std::vector<lanes> x, steps, slopes, written, dy, y, dgate, dwritten, dlogs;  // slopes: of softplus; dgate: dz / y
    std::vector<Group> states, decays;  // states: those before each position, and the last

    explicit Room(int64_t length)
        : x(length), steps(length), slopes(length), written(length), dy(length), y(length), dgate(length),
          dwritten(length), dlogs(length), states(length + 1), decays(length) {}

    template <class T, class S>
    void enter(const Inputs<T, S>& given, const T* dy_given, const Segment& segment, const Part& part, int64_t tile,
               const Sizes& size) {
        int64_t first = part.first + tile * LANES, count = part.tile_count(tile);
        lanes bias = given.bias == nullptr ? lanes{} : fetched(given.bias + first, count), skip = fetched(given.d + first, count);
        for (int64_t t = 0; t < segment.length; t++) {
            int64_t at = (segment.row + t) * size.channels() + first;
            x[t] = fetched(given.x + at, count);
            dy[t] = fetched(dy_given + at, count);
            steps[t] = fetched(given.dt + at, count);
            if (given.bias != nullptr) {
                slopes[t] = each<sigmoid>(steps[t] + bias);
                steps[t] = each<softplus>(steps[t] + bias);
            }
            if (given.z != nullptr) {
                lanes z = fetched(given.z + segment.z_at(t, part, size) + first, count), s = each<sigmoid>(z);
                y[t] = x[t] * skip;
                dgate[t] = dy[t] * (s + z * s * (1.0f - s));
                dy[t] *= z * s;
            }
            written[t] = x[t] * steps[t];
            dwritten[t] = dlogs[t] = lanes{};
        }
    }
};

// Gradients of B and C at a position, a block's sums: each lane its own channels'.
struct Shared {
    lanes write[RATES], read[RATES];
};

// A group of rates through a segment, forwards from states[0]: states and decays, C's gradient, and what is scanned if it is gated.
template <bool GATED>
void again(Room& room, Shared* shared, const Group& rates, const float* write, const float* read, const Segment& segment) {
    Group *states = room.states.data(), *decays = room.decays.data(), state = states[0], rate = rates;
    const lanes *steps = room.steps.data(), *written = room.written.data(), *dy = room.dy.data();
    for (int64_t t = 0; t < segment.length; t++) {
        if (segment.starts(t)) state = Group{};
        lanes y = room.y[t];
#pragma GCC unroll 4
        for (int64_t k = 0; k < RATES; k++) {
            lanes decay = exp2(steps[t] * rate.of[k]);
            decays[t].of[k] = decay;
            state.of[k] = decay * state.of[k] + written[t] * write[t * RATES + k];
            states[t + 1].of[k] = state.of[k];
            shared[t].read[k] += dy[t] * state.of[k];
            if (GATED) y += state.of[k] * read[t * RATES + k];
        }
        if (GATED) room.y[t] = y;
    }
}

// The same backwards. later: what the state after the segment gets from the positions that follow, then the one before it.
void back(Room& room, Shared* shared, const Group& rates, Group& drate, Group& later, const float* write, const float* read,
          const Segment& segment) {
    const Group *states = room.states.data(), *decays = room.decays.data();
    const lanes *steps = room.steps.data(), *written = room.written.data(), *dy = room.dy.data();
    Group after = later, total = drate, rate = rates;
    for (int64_t t = segment.length - 1; t >= 0; t--) {
        lanes dwritten = room.dwritten[t], dlogs = room.dlogs[t];
        bool starts = segment.starts(t);
#pragma GCC unroll 4
        for (int64_t k = 0; k < RATES; k++) {
            lanes dstate = after.of[k] + dy[t] * read[t * RATES + k];
            shared[t].write[k] += written[t] * dstate;
            dwritten += dstate * write[t * RATES + k];
            after.of[k] = decays[t].of[k] * dstate;
            lanes dlog = after.of[k] * states[t].of[k];
            if (starts) dlog = lanes{};
            dlogs += dlog * rate.of[k];
            total.of[k] += dlog * steps[t];
        }
        if (starts) after = Group{};  // what was before it decays to nothing, whatever the step
        room.dwritten[t] = dwritten, room.dlogs[t] = dlogs;
    }
    later = after, drate = total;
}

// db, dc (B, H, blocks, T, N): each block's own.
template <class T, class S>
void backward_part(const T* dy, const Inputs<T, S>& given, float* kept, const Gradients<T, S>& made, float* db, float* dc,
                   const Part& part, const Sizes& size) {
    int64_t groups = size.groups();
    std::vector<Group> rates = rates_of(given.a, part, size), drates(rates.size(), Group{}), later(rates.size(), Group{});
    std::vector<lanes> dskip(part.tiles, lanes{}), dbias(part.tiles, lanes{});
    std::vector<Shared> shared(groups * size.segment);
    Segment segment(size);
    Room room(size.segment);
    for (int64_t number = size.segments() - 1; number >= 0; number--) {
        segment.enter(number, given, part, size);
        std::fill(shared.begin(), shared.end(), Shared{});
        for (int64_t tile = 0; tile < part.tiles; tile++) {
            int64_t count = part.tile_count(tile), first = part.first + tile * LANES;
            room.enter(given, dy, segment, part, tile, size);
            for (int64_t group = 0; group < groups; group++) {
                int64_t one = tile * groups + group, at = group * size.segment;
                const float *write = segment.writes.data() + at * RATES, *read = segment.reads.data() + at * RATES;
                room.states[0] = Group{};
                copy_kept<false>(kept, room.states[0], number, group, part, tile, size);
                (given.z == nullptr ? again<false> : again<true>)(room, shared.data() + at, rates[one], write, read, segment);
                back(room, shared.data() + at, rates[one], drates[one], later[one], write, read, segment);
            }
            lanes skip = fetched(given.d + first, count);
            for (int64_t t = 0; t < segment.length; t++) {
                int64_t at = (segment.row + t) * size.channels() + first;
                lanes dstep = room.dwritten[t] * room.x[t] + room.dlogs[t] * (1.0f / LOG2_E);
                if (given.bias != nullptr) dstep *= room.slopes[t];
                dskip[tile] += room.x[t] * room.dy[t];
                dbias[tile] += dstep;
                put(made.dx + at, room.dwritten[t] * room.steps[t] + room.dy[t] * skip, count);
                put(made.ddt + at, dstep, count);
                if (given.z != nullptr) put(made.dz + at, room.dgate[t] * room.y[t], count);
            }
        }
        int64_t row = ((part.sequence * size.heads + part.head) * size.blocks() + part.block) * size.length + segment.begin;
        for (int64_t t = 0; t < segment.length; t++) {
            for (int64_t n = 0; n < size.state; n++) {
                const Shared& sums = shared[n / RATES * size.segment + t];
                db[(row + t) * size.state + n] = sum_of(sums.write[n % RATES]);
                dc[(row + t) * size.state + n] = sum_of(sums.read[n % RATES]);
            }
        }
    }
    for (int64_t tile = 0; tile < part.tiles; tile++) {
        int64_t first = part.sequence * size.channels() + part.first + tile * LANES, count = part.tile_count(tile);
        put(made.dd + first, dskip[tile], count);
        if (given.bias != nullptr) put(made.dbias + first, dbias[tile], count);
        for (int64_t i = 0; i < count; i++)
            for (int64_t n = 0; n < size.state; n++)
                made.da[(first + i) * size.state + n] = drates[tile * groups + n / RATES].of[n % RATES][i];
    }
}

// to (B, T, H, N): the sums of (B, H, blocks, T, N) over blocks.
template <class T>
void add_blocks(T* to, const float* from, const Sizes& size, int threads) {
    int64_t block = size.length * size.state;
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t b = 0; b < size.batch; b++) {
        for (int64_t t = 0; t < size.length; t++) {
            for (int64_t h = 0; h < size.heads; h++) {
                const float* own = from + (b * size.heads + h) * size.blocks() * block + t * size.state;
                for (int64_t n = 0; n < size.state; n++) {
                    float sum = 0.0f;
                    for (int64_t number = 0; number < size.blocks(); number++) sum += own[number * block + n];
                    to[((b * size.length + t) * size.heads + h) * size.state + n] = stored<T>(sum);
                }
            }
        }
    }
}

template <class T, class S>
void backward(const T* dy, const Inputs<T, S>& given, float* kept, const Gradients<T, S>& made, const Sizes& size, int threads) {
    int64_t count = size.parts() * size.length * size.state;
    std::unique_ptr<float[]> db(new float[count]), dc(new float[count]);  // a vector would be filled with zeros first
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t part = 0; part < size.parts(); part++)
        backward_part(dy, given, kept, made, db.get(), dc.get(), Part(part, size), size);
    add_blocks(made.db, db.get(), size, threads);
    add_blocks(made.dc, dc.get(), size, threads);
}

}  // namespace

#define INPUTS(T, S)                                                                                                           \
    const T *x, const S *dt, const float *a, const T *b, const T *c, const float *d, const float *bias, const T *z,            \
        const uint8_t *starts
#define SIZES                                                                                                                  \
    int64_t batch, int64_t length, int64_t heads, int64_t width, int64_t state, int64_t b_sequence, int64_t b_row,             \
        int64_t b_head, int64_t c_sequence, int64_t c_row, int64_t c_head, int64_t z_sequence, int64_t z_row, int64_t segment, \
        int64_t threads
#define SIZE                                                                                                                   \
    Sizes { batch, length, heads, width, state, b_sequence, b_row, b_head, c_sequence, c_row, c_head, z_sequence, z_row, segment }
#define EXPORT(T, S, FORWARD, BACKWARD)                                                                                        \
    extern "C" void FORWARD(INPUTS(T, S), T* y, float* kept, SIZES) {                                                          \
        forward(Inputs<T, S>{x, dt, a, b, c, d, bias, z, starts}, y, kept, SIZE, threads);                                     \
    }                                                                                                                          \
    extern "C" void BACKWARD(const T* dy, INPUTS(T, S), float* kept, T* dx, S* ddt, float* da, T* db, T* dc, float* dd,        \
                             float* dbias, T* dz, SIZES) {                                                                     \
        Inputs<T, S> given{x, dt, a, b, c, d, bias, z, starts};                                                                \
        backward(dy, given, kept, Gradients<T, S>{dx, ddt, da, db, dc, dd, dbias, dz}, SIZE, threads);                         \
    }
EXPORT(float, float, forward_f32, backward_f32)
EXPORT(bf16, float, forward_bf16, backward_bf16)
EXPORT(bf16, bf16, forward_all_bf16, backward_all_bf16)
