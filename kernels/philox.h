#ifndef RESA_KERNELS_PHILOX_H_
#define RESA_KERNELS_PHILOX_H_

// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3" (SC 2011): a pure function of (key, counter), so a draw depends on its request's seed
// and its index alone. Usable on host and device.

#include <cstdint>

#ifdef __CUDACC__
#define RESA_HOST_DEVICE __host__ __device__
#else
#define RESA_HOST_DEVICE
#endif

namespace resa::kernels {

struct PhiloxWords {
  uint32_t word[4];
};

RESA_HOST_DEVICE constexpr PhiloxWords Philox4x32(PhiloxWords counter, uint32_t key0,
                                                  uint32_t key1) {
  constexpr uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{kMul0} * counter.word[0];
    const uint64_t p1 = uint64_t{kMul1} * counter.word[2];
    counter = PhiloxWords{
        {static_cast<uint32_t>(p1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(p0)}};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

// The uniform draw in [0, 1), 53 random bits, that picks output token `draw_index` of a request.
RESA_HOST_DEVICE constexpr double PhiloxUniform(uint64_t seed, uint64_t draw_index) {
  const PhiloxWords out =
      Philox4x32(PhiloxWords{{static_cast<uint32_t>(draw_index),
                              static_cast<uint32_t>(draw_index >> 32), 0, 0}},
                 static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  const uint64_t bits = (uint64_t{out.word[0]} << 32) | out.word[1];
  return static_cast<double>(bits >> 11) * 0x1.0p-53;
}

}  // namespace resa::kernels

#endif  // RESA_KERNELS_PHILOX_H_
