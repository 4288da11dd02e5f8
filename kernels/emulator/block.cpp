#include "block.h"

#include <cstdlib>
#include <utility>

namespace simt {
namespace {

constexpr int kPoison = 0xff;  // every float format reads NaN

bool same_site(Site a, Site b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

}  // namespace

std::string describe(Site site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

std::string describe(const dim3& index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
         std::to_string(index.z) + ")";
}

Block::Block(const Shape& shape, size_t index, std::unique_ptr<StackArena> stacks, void (*entry)(),
             Scheduler& scheduler)
    : shape_(shape),
      scheduler_(scheduler),
      stacks_(std::move(stacks)),
      threads_(shape.threads()),
      warps_((shape.threads() + kWarpSize - 1) / kWarpSize),
      live_(shape.threads()) {
  stacks_->reserve(threads_.size());
  // Exactly as much as was asked for, so that ASan sees an access behind it.
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, max<size_t>(shape.shared_bytes, 1)) != 0) abort();
  memset(memory, kPoison, shape.shared_bytes);
  shared_.reset(static_cast<unsigned char*>(memory));
  const dim3 grid = shape.grid, size = shape.block;
  const dim3 place(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y);
  for (size_t i = 0; i < threads_.size(); ++i) {
    Thread& thread = threads_[i];
    thread.number = static_cast<unsigned>(i);
    thread.block = this;
    thread.indices = {dim3(i % size.x, i / size.x % size.y, i / size.x / size.y), place, size,
                      grid};
    thread.fiber.prepare(entry, stacks_->bottom(i), stacks_->bytes());
  }
}

std::unique_ptr<StackArena> Block::retire() {
  for (Thread& thread : threads_) thread.fiber.retire();
  return std::move(stacks_);
}

bool Block::owns(const void* address, size_t bytes) const {
  const auto at = reinterpret_cast<uintptr_t>(address);
  const auto begin = reinterpret_cast<uintptr_t>(shared_.get());
  return at >= begin && at + bytes <= begin + shape_.shared_bytes;
}

void Block::wait(Thread& thread, State state, Site site) {
  thread.state = state;
  thread.site = site;
  scheduler_.suspend();
}

void Block::finish(Thread& thread) {
  thread.state = State::kFinished;
  --live_;
  scheduler_.note_progress();
  if (live_ > 0 && at_barrier_ == live_) release_barrier();
}

// Threads that have returned count as arrived, as on every GPU since Volta.
void Block::barrier(Thread& thread, Site site) {
  if (at_barrier_ == 0) {
    barrier_site_ = site;
  } else if (!same_site(barrier_site_, site)) {
    scheduler_.fail("divergent __syncthreads: other threads wait at " + describe(barrier_site_) +
                        ", this one came to the one",
                    site);
  }
  char* const token = &barrier_tokens_[barrier_generation_ & 1];
  release_edge(token);
  if (++at_barrier_ == live_) {
    release_barrier();
    scheduler_.interleave();
  } else {
    wait(thread, State::kAtBarrier, site);
  }
  acquire_edge(token);
}

void Block::release_barrier() {
  for (Thread& thread : threads_) {
    if (thread.state == State::kAtBarrier) thread.state = State::kReady;
  }
  at_barrier_ = 0;
  ++barrier_generation_;
  scheduler_.note_progress();
}

Meeting& Block::meeting_of(const Thread& thread, unsigned mask, Site site) {
  const unsigned first = thread.number / kWarpSize * kWarpSize;
  const size_t lanes = min<size_t>(threads_.size() - first, kWarpSize);
  const unsigned existing = lanes == kWarpSize ? kWholeWarp : (1u << lanes) - 1;
  if ((mask >> thread.lane() & 1) == 0) {
    scheduler_.fail("a lane calls a collective without being in its mask", site);
  }
  // Lanes that were never launched may be named; lanes that returned may not, and are waited for.
  mask &= existing;
  std::deque<Meeting>& meetings = warps_[thread.number / kWarpSize];
  for (Meeting& meeting : meetings) {
    if (meeting.mask == mask) return meeting;
  }
  meetings.emplace_back().mask = mask;
  return meetings.back();
}

unsigned Block::meet(Thread& thread, unsigned mask, uint64_t value, Site site, bool orders_memory,
                     Meeting** met) {
  Meeting& meeting = meeting_of(thread, mask, site);
  *met = &meeting;
  if (meeting.arrived == 0) {
    meeting.site = site;
  } else if (!same_site(meeting.site, site)) {
    scheduler_.fail("lanes of one mask call different collectives: others wait at " +
                        describe(meeting.site) + ", this one came to the one",
                    site);
  }
  const unsigned parity = meeting.generation & 1;
  meeting.values[parity][thread.lane()] = value;
  meeting.arrived |= 1u << thread.lane();
  if (orders_memory) release_edge(meeting.values[parity]);
  if (meeting.arrived == meeting.mask) {
    meeting.arrived = 0;
    ++meeting.generation;
    for (Thread& other : threads_) {
      if (other.state == State::kInCollective && other.meeting == &meeting) {
        other.state = State::kReady;
      }
    }
    scheduler_.note_progress();
    scheduler_.interleave();
  } else {
    thread.meeting = &meeting;
    wait(thread, State::kInCollective, site);
  }
  if (orders_memory) acquire_edge(meeting.values[parity]);
  return parity;
}

}  // namespace simt
