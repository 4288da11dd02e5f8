// The one place for vectors of floats: loads, stores, conversions, sums, exp.
//
// Written with GCC's vector extensions, so that one source is AVX-512, AVX2 or plain code, as the
// compiler's target says. A wider vector than the target has is split by the compiler.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace megachat {

#if defined(MEGACHAT_LANES)
constexpr int kLanes = MEGACHAT_LANES;
#elif defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

// The upper half of a float32.
struct BFloat16 {
    uint16_t bits;
};

inline Floats all(float x) { return x - Floats{}; }

inline Floats load(const float* from) {
    Floats result;
    std::memcpy(&result, from, sizeof result);
    return result;
}

inline Floats load(const BFloat16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

// The first `count` elements, zeros behind them; reads no further.
template <class T>
inline Floats load_first(const T* from, int count) {
    if (count >= kLanes) return load(from);
    T padded[kLanes] = {};
    std::memcpy(padded, from, count * sizeof(T));
    return load(padded);
}

// What a product reads of a row at once: two vectors. Of bfloat16, which is read as pairs, these
// are elements 0, 2, 4, ... and elements 1, 3, 5, ...: an upper half is a float32 as soon as it
// stands in its place, so that each of the two costs one instruction.
constexpr int kParts = 2;

template <int Part>
inline Floats load_part(const float* from) {
    return load(from + Part * kLanes);
}

template <int Part>
inline Floats load_part(const BFloat16* from) {
    Words pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    return (Floats)(Part == 0 ? pairs << 16 : pairs & 0xffff0000u);
}

// As `load_part` of the first `count` elements and zeros behind them; reads no further.
template <int Part, class T>
inline Floats load_first_part(const T* from, int count) {
    T padded[kLanes * kParts] = {};
    std::memcpy(padded, from, count * sizeof(T));
    return load_part<Part>(padded);
}

// Whether a vector is a register of the target, and not split into several.
#if defined(__AVX512F__)
constexpr bool kIsRegister = kLanes == 16;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr bool kIsRegister = kLanes == 8;
#else
constexpr bool kIsRegister = false;
#endif

// total += a * b with the total in a register of its own. Where many totals are at work GCC would
// let them change registers, and run out of them.
inline void multiply_add(Floats& total, Floats a, Floats b) {
#if defined(__AVX512F__)
    if constexpr (kIsRegister) {
        asm("vfmadd231ps %2, %1, %0" : "+v"(total) : "v"(a), "v"(b));
        return;
    }
#elif defined(__AVX2__) && defined(__FMA__)
    if constexpr (kIsRegister) {
        asm("vfmadd231ps %2, %1, %0" : "+x"(total) : "x"(a), "x"(b));
        return;
    }
#endif
    total += a * b;
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

// Rounds to the nearest, ties to even; NaN stays NaN.
inline void store(BFloat16* to, Floats x) {
    const Words bits = (Words)x;
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words is_number = (Words)(x == x);
    const Words kept = (rounded & is_number) | (0x7fc0u & ~is_number);
    const Halves halves = __builtin_convertvector(kept, Halves);
    std::memcpy(to, &halves, sizeof halves);
}

template <class T>
inline void store_first(T* to, Floats x, int count) {
    if (count >= kLanes) return store(to, x);
    T padded[kLanes];
    store(padded, x);
    std::memcpy(to, padded, count * sizeof(T));
}

// What is left of `x` after a round trip through T.
template <class T>
inline Floats rounded_to(Floats x) {
    if constexpr (std::is_same_v<T, float>) return x;
    T stored[kLanes];
    store(stored, x);
    return load(stored);
}

template <int... I>
inline Ints partners(int step, std::integer_sequence<int, I...>) {
    return Ints{(I ^ step)...};
}

inline float sum(Floats x) {
    for (int step = kLanes / 2; step; step /= 2) {
        x += __builtin_shuffle(x, partners(step, std::make_integer_sequence<int, kLanes>{}));
    }
    return x[0];
}

template <int Step, int... I>
inline void exchange_two(Floats& a, Floats& b, std::integer_sequence<int, I...>) {
    const Floats first = __builtin_shuffle(a, b, Ints{(I & Step ? kLanes + (I ^ Step) : I)...});
    b = __builtin_shuffle(a, b, Ints{(I & Step ? kLanes + I : I ^ Step)...});
    a = first;
}

template <int Step>
inline void fold(Floats* x, int count) {
    for (int i = 0; i < count; i += 2) {
        exchange_two<Step>(x[i], x[i + 1], std::make_integer_sequence<int, kLanes>{});
        x[i / 2] = x[i] + x[i + 1];
    }
    if constexpr (Step > 1) fold<Step / 2>(x, count / 2);
}

// The sums of at most kLanes vectors in one, each added up in the order of `sum`; that of x[i] is
// in lane `lane_of_sum(i)`. Folding a vector's halves onto each other fills half a register: two
// vectors are folded at once, then four, and so on.
template <int Count>
inline Floats sums_of(const Floats* x) {
    Floats part[kLanes] = {};
    for (int i = 0; i < Count; ++i) part[i] = x[i];
    fold<kLanes / 2>(part, kLanes);
    return part[0];
}

// The bits of i in reverse: the first fold puts odd vectors into the upper half.
constexpr int lane_of_sum(int i) {
    int lane = 0;
    for (int bit = 1; bit < kLanes; bit *= 2) {
        if (i & bit) lane += kLanes / 2 / bit;
    }
    return lane;
}

// x[i][k] to x[k][i].
template <int Step = kLanes / 2>
inline void transpose(Floats (&x)[kLanes]) {
    for (int i = 0; i < kLanes; ++i) {
        if (i & Step) continue;
        exchange_two<Step>(x[i], x[i + Step], std::make_integer_sequence<int, kLanes>{});
    }
    if constexpr (Step > 1) transpose<Step / 2>(x);
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline float largest(Floats x) {
    float result = x[0];
    for (int i = 1; i < kLanes; ++i) result = x[i] > result ? x[i] : result;
    return result;
}

// e^x for x <= 0, to 2 units in the last place; 0 below -87; NaN stays NaN.
inline Floats exp_of_negative(Floats x) {
    const Floats floor = all(-87.0f);
    const Ints vanishes = x < floor;  // -inf as well, whose bits must not reach the exponent
    x = vanishes ? floor : x;
    // x = n log 2 + r with |r| <= log(2) / 2; adding 1.5 x 2^23 rounds to a whole number.
    const Floats shift = all(12582912.0f);
    const Floats shifted = x * 1.44269504088896341f + shift;
    const Words n = (Words)shifted - (Words)shift;
    const Floats whole = shifted - shift;
    const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Floats result = p * (Floats)((n + 127) << 23);
    return (Floats)((Ints)result & ~vanishes);
}

}  // namespace megachat
