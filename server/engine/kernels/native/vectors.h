// Sixteen floats at a time, on whatever the compiler was told that the CPU has.
//
// Knows instruction sets and number formats; knows nothing of attention. A function with the same name does the same
// arithmetic at every level, but its last bits may differ from level to level (fused multiply-add or not).
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PROMPTMUX_ALWAYS __attribute__((always_inline))
#define PROMPTMUX_INLINE inline PROMPTMUX_ALWAYS

namespace promptmux {

constexpr int kLanes = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

PROMPTMUX_INLINE Floats load(const float* from) {
  Floats loaded;
  std::memcpy(&loaded, from, sizeof(loaded));
  return loaded;
}

PROMPTMUX_INLINE void store(float* to, Floats vector) { std::memcpy(to, &vector, sizeof(vector)); }

PROMPTMUX_INLINE Floats splat(float number) { return Floats{} + number; }

PROMPTMUX_INLINE Floats as_floats(Ints bits) { return __builtin_bit_cast(Floats, bits); }

PROMPTMUX_INLINE Ints as_ints(Floats bits) { return __builtin_bit_cast(Ints, bits); }

PROMPTMUX_INLINE Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

// acc + a * b, rounded once where the CPU can.
PROMPTMUX_INLINE Floats multiply_add(Floats a, Floats b, Floats acc) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)acc);
#elif defined(__FMA__)
  __m256 halves[3][2];
  std::memcpy(halves[0], &a, sizeof(a));
  std::memcpy(halves[1], &b, sizeof(b));
  std::memcpy(halves[2], &acc, sizeof(acc));
  for (int i = 0; i < 2; ++i) halves[2][i] = _mm256_fmadd_ps(halves[0][i], halves[1][i], halves[2][i]);
  std::memcpy(&acc, halves[2], sizeof(acc));
  return acc;
#else
  return acc + a * b;
#endif
}

PROMPTMUX_INLINE float largest(Floats vector) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)vector);
#else
  float lanes[kLanes];
  store(lanes, vector);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  }
  return lanes[0];
#endif
}

PROMPTMUX_INLINE float sum(Floats vector) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)vector);
#else
  float lanes[kLanes];
  store(lanes, vector);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
#endif
}

// Sixteen numbers of a format as floats.
template <typename T>
PROMPTMUX_INLINE Floats load_as_floats(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return load(from);
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
  } else if constexpr (std::is_same_v<T, c10::Half>) {
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#endif
  } else {
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(from[i]);
    return load(lanes);
  }
}

// The first `count` of sixteen numbers, the others zero; nothing beyond them is read.
template <typename T>
PROMPTMUX_INLINE Floats load_some_as_floats(const T* from, int count) {
  if (count >= kLanes) return load_as_floats(from);
  T padded[kLanes] = {};
  std::memcpy(padded, from, sizeof(T) * count);
  return load_as_floats(padded);
}

template <typename T>
PROMPTMUX_INLINE void store_some(T* to, Floats vector, int count) {
  float lanes[kLanes];
  store(lanes, vector);
  for (int i = 0; i < (count < kLanes ? count : kLanes); ++i) to[i] = static_cast<T>(lanes[i]);
}

// e to the power of each lane, within two units of the last place; zero below -87. NaN stays NaN.
// The range reduction and polynomial of Cephes' expf (Moshier 1992).
PROMPTMUX_INLINE Floats exponential(Floats x) {
  const Floats kRound = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Floats shifted = multiply_add(x, splat(1.44269504088896341f), kRound);
  const Ints exponent = as_ints(shifted) - as_ints(kRound);
  const Floats whole = shifted - kRound;
  Floats rest = multiply_add(whole, splat(-0.693359375f), x);
  rest = multiply_add(whole, splat(2.12194440e-4f), rest);
  Floats series = splat(1.9875691500e-4f);
  series = multiply_add(series, rest, splat(1.3981999507e-3f));
  series = multiply_add(series, rest, splat(8.3334519073e-3f));
  series = multiply_add(series, rest, splat(4.1665795894e-2f));
  series = multiply_add(series, rest, splat(1.6666665459e-1f));
  series = multiply_add(series, rest, splat(5.0000001201e-1f));
  series = multiply_add(series, rest * rest, rest + 1.0f);
  const Floats result = series * as_floats((exponent + 127) << 23);
  return x < -87.0f ? Floats{} : result;
}

PROMPTMUX_INLINE Floats hyperbolic_tangent(Floats x) {
  const Floats size = x < 0.0f ? -x : x;
  const Floats decay = exponential(size * -2.0f);
  const Floats result = (1.0f - decay) / (1.0f + decay);
  return x < 0.0f ? -result : result;
}

#if defined(__AVX512F__)

// Row i, lane j becomes row j, lane i.
PROMPTMUX_INLINE void transpose(Floats (&rows)[kLanes]) {
  __m512 a[kLanes], b[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    a[i] = _mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(a[i + j]), high = _mm512_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  for (int j = 0; j < 4; ++j) {
    a[j] = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88);
    a[4 + j] = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);
    a[8 + j] = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
    a[12 + j] = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
  }
  for (int j = 0; j < 8; ++j) {
    rows[j] = (Floats)_mm512_shuffle_f32x4(a[j], a[8 + j], 0x88);
    rows[8 + j] = (Floats)_mm512_shuffle_f32x4(a[j], a[8 + j], 0xdd);
  }
}

#else

PROMPTMUX_INLINE void transpose(Floats (&rows)[kLanes]) {
  float* numbers = reinterpret_cast<float*>(rows);
  for (int i = 0; i < kLanes; ++i) {
    for (int j = i + 1; j < kLanes; ++j) {
      const float kept = numbers[i * kLanes + j];
      numbers[i * kLanes + j] = numbers[j * kLanes + i];
      numbers[j * kLanes + i] = kept;
    }
  }
}

#endif

}  // namespace promptmux
