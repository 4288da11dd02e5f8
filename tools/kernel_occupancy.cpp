// How many blocks of a kernel a multiprocessor holds, by the toolkit's own header, without a GPU.
//
// Reads lines "architecture registers threads shared_bytes", writes "blocks limit" for each; the
// limit is one of warps, registers, shared, blocks. Sizes are those of an A100 and an H100 as the
// CUDA programming guide states them (compute capabilities 8.0 and 9.0).
#include <cuda_occupancy.h>

#include <climits>
#include <iostream>
#include <string>

static cudaOccDeviceProp device_of(const std::string& architecture) {
  cudaOccDeviceProp device = {};
  const bool ampere = architecture == "80";
  device.computeMajor = ampere ? 8 : 9;
  device.maxThreadsPerBlock = 1024;
  device.maxThreadsPerMultiprocessor = 2048;
  device.regsPerBlock = device.regsPerMultiprocessor = 65536;
  device.warpSize = 32;
  device.sharedMemPerBlock = 48 << 10;
  device.sharedMemPerMultiprocessor = (ampere ? 164 : 228) << 10;
  device.sharedMemPerBlockOptin = (ampere ? 163 : 227) << 10;
  device.reservedSharedMemPerBlock = 1 << 10;
  device.numSms = ampere ? 108 : 132;
  return device;
}

int main() {
  std::string architecture;
  int registers, threads;
  size_t shared_bytes;
  while (std::cin >> architecture >> registers >> threads >> shared_bytes) {
    const cudaOccDeviceProp device = device_of(architecture);
    cudaOccFuncAttributes function = {};
    function.maxThreadsPerBlock = INT_MAX;
    function.numRegs = registers;
    function.maxDynamicSharedSizeBytes = 48 << 10;
    function.numBlockBarriers = 1;
    const cudaOccDeviceState state = {};
    cudaOccResult result = {};
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &function, &state, threads,
                                                shared_bytes) != CUDA_OCC_SUCCESS) {
      return 1;
    }
    const int blocks = result.activeBlocksPerMultiprocessor;
    const char* const limit = result.blockLimitWarps == blocks    ? "warps"
                              : result.blockLimitRegs == blocks   ? "registers"
                              : result.blockLimitSharedMem == blocks ? "shared"
                                                                     : "blocks";
    std::cout << blocks << " " << limit << "\n";
  }
}
