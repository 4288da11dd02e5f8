// A stand-in for the CUDA driver's virtual memory functions, over host memory.
//
// It refuses what the driver refuses: sizes and addresses off the granularity, ranges that are not
// reserved, memory that is mapped twice or not at all, ranges that are unmapped other than they were
// mapped. Memory without access is not readable, so that a use before cuMemSetAccess ends the process.
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <map>

#ifdef WITH_CUDA_H
#include <cuda.h>
#else
typedef int CUresult;
typedef uint64_t CUdeviceptr;
typedef uint64_t CUmemGenericAllocationHandle;
struct CUmemLocation {
  int type;
  int id;
};
struct CUmemAllocationProp {
  int type;
  int requestedHandleTypes;
  CUmemLocation location;
  void* win32HandleMetaData;
  struct {
    unsigned char compressionType;
    unsigned char gpuDirectRDMACapable;
    unsigned short usage;
    unsigned char reserved[4];
  } allocFlags;
};
struct CUmemAccessDesc {
  CUmemLocation location;
  int flags;
};
#endif

namespace {
constexpr size_t kGranularity = 1 << 16;
constexpr int kInvalidValue = 1, kOutOfMemory = 2;

struct Handle {
  size_t size;
  bool mapped = false;
  bool released = false;
};

std::map<uint64_t, size_t> reservations;
std::map<uint64_t, Handle> handles;             // by handle
std::map<uint64_t, std::pair<size_t, uint64_t>> mappings;  // by address: size, handle
uint64_t next_handle = 1;
long long limit = -1;  // granules that may exist; negative: any number

bool Aligned(uint64_t value) { return value % kGranularity == 0; }

bool Reserved(uint64_t address, size_t size) {
  auto at = reservations.upper_bound(address);
  if (at == reservations.begin()) return false;
  --at;
  return address + size <= at->first + at->second;
}

// Granules of all handles.
long long Live() {
  long long live = 0;
  for (const auto& [_, handle] : handles) live += handle.size / kGranularity;
  return live;
}

bool Mapped(uint64_t address) {
  auto at = mappings.upper_bound(address);
  if (at == mappings.begin()) return false;
  --at;
  return address < at->first + at->second.first;
}

void Forget(uint64_t handle) {
  const Handle& found = handles.at(handle);
  if (!found.mapped && found.released) handles.erase(handle);
}

void Remap(uint64_t address, size_t size, int protection) {
  mmap(reinterpret_cast<void*>(address), size, protection,
       MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}
}  // namespace

// Older toolkits' headers spell these functions as macros of themselves with a version.
#undef cuMemGetAllocationGranularity
#undef cuMemGetInfo
#define RESULT(code) static_cast<CUresult>(code)

extern "C" {
long long stub_live_granules() { return Live(); }
long long stub_mapped_granules() {
  long long mapped = 0;
  for (const auto& [_, mapping] : mappings) mapped += mapping.first / kGranularity;
  return mapped;
}
long long stub_reservations() { return static_cast<long long>(reservations.size()); }
void stub_limit(long long granules) { limit = granules; }
size_t stub_size_of_properties() { return sizeof(CUmemAllocationProp); }
size_t stub_size_of_access() { return sizeof(CUmemAccessDesc); }

#ifdef WITH_CUDA_H
#define FLAGS(type) type
#else
#define FLAGS(type) int
#endif

CUresult cuMemGetAllocationGranularity(size_t* granularity, const CUmemAllocationProp* properties,
                                       FLAGS(CUmemAllocationGranularity_flags)) {
  if (properties->type != 1 || properties->location.type != 1) return RESULT(kInvalidValue);
  *granularity = kGranularity;
  return RESULT(0);
}

// The function without a version is an old one, which counts in 32 bits.
CUresult cuMemGetInfo_v2(size_t* available, size_t* total) {
  const long long granules = limit < 0 ? 1 << 20 : limit;
  *total = granules * kGranularity;
  *available = (granules - Live()) * kGranularity;
  return RESULT(0);
}

CUresult cuMemAddressReserve(CUdeviceptr* address, size_t size, size_t, CUdeviceptr,
                             unsigned long long) {
  if (!size || !Aligned(size)) return RESULT(kInvalidValue);
  void* base = mmap(nullptr, size + kGranularity, PROT_NONE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return RESULT(kOutOfMemory);
  *address = (reinterpret_cast<uint64_t>(base) + kGranularity - 1) / kGranularity * kGranularity;
  reservations[*address] = size;
  return RESULT(0);
}

CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
  auto found = reservations.find(address);
  if (found == reservations.end() || found->second != size) return RESULT(kInvalidValue);
  auto mapped = mappings.lower_bound(address);
  if (mapped != mappings.end() && mapped->first < address + size) return RESULT(kInvalidValue);
  reservations.erase(found);
  return RESULT(munmap(reinterpret_cast<void*>(address), size) ? kInvalidValue : 0);
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size,
                     const CUmemAllocationProp* properties, unsigned long long flags) {
  if (!size || !Aligned(size) || flags) return RESULT(kInvalidValue);
  if (properties->type != 1 || properties->location.type != 1) return RESULT(kInvalidValue);
  if (limit >= 0 && Live() + static_cast<long long>(size / kGranularity) > limit)
    return RESULT(kOutOfMemory);
  *handle = next_handle++;
  handles[*handle] = Handle{size};
  return RESULT(0);
}

CUresult cuMemMap(CUdeviceptr address, size_t size, size_t offset,
                  CUmemGenericAllocationHandle handle, unsigned long long flags) {
  auto found = handles.find(handle);
  if (found == handles.end() || found->second.size != size || offset || flags)
    return RESULT(kInvalidValue);
  if (!Aligned(address) || !Reserved(address, size)) return RESULT(kInvalidValue);
  for (uint64_t at = address; at < address + size; at += kGranularity)
    if (Mapped(at)) return RESULT(kInvalidValue);
  mappings[address] = {size, handle};
  found->second.mapped = true;
  return RESULT(0);
}

CUresult cuMemSetAccess(CUdeviceptr address, size_t size, const CUmemAccessDesc* access,
                        size_t count) {
  if (count != 1 || access->location.type != 1 || access->flags != 3) return RESULT(kInvalidValue);
  for (uint64_t at = address; at < address + size; at += kGranularity)
    if (!Mapped(at)) return RESULT(kInvalidValue);
  Remap(address, size, PROT_READ | PROT_WRITE);
  return RESULT(0);
}

CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
  auto found = mappings.find(address);
  if (found == mappings.end() || found->second.first != size) return RESULT(kInvalidValue);
  const uint64_t handle = found->second.second;
  mappings.erase(found);
  handles.at(handle).mapped = false;
  Forget(handle);
  Remap(address, size, PROT_NONE);
  return RESULT(0);
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  auto found = handles.find(handle);
  if (found == handles.end() || found->second.released) return RESULT(kInvalidValue);
  found->second.released = true;
  Forget(handle);
  return RESULT(0);
}
}
