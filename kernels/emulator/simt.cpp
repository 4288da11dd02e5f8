// Runs thread blocks on fibers. Never instrumented itself, also where the kernels are: a sanitizer
// sees the kernels' accesses and, through fiber.h, what orders them.
//
// The order that TSan is told: a launch begins after its caller and ends before it goes on, and
// __syncthreads and __syncwarp order the threads that meet there. Shuffles, ballots and atomics
// order nothing, as in CUDA's memory model, and blocks of one launch are unordered.
#include "simt.h"

#include <array>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"

namespace simt {

ThreadIndices indices;

namespace {

constexpr size_t kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 48 << 10;  // what a kernel gets without asking for more
constexpr unsigned kMaxGridYz = 65535;
constexpr int kPoison = 0xff;  // every float format reads NaN
constexpr unsigned kWholeWarp = 0xffffffffu;

enum class State { kReady, kAtBarrier, kInCollective, kFinished };

// The lanes of one mask meeting, again and again. Two sets of values, since a fast lane may hand in
// its next value before a slow one has read the last.
struct Meeting {
  unsigned mask = 0;
  unsigned arrived = 0;
  unsigned generation = 0;
  Site site{};
  uint64_t values[2][kWarpSize] = {};
};

struct Thread {
  Fiber fiber;
  State state = State::kReady;
  ThreadIndices indices;
  unsigned number = 0;  // within the block
  Site site{};          // where it waits
  Meeting* meeting = nullptr;
};

struct FreeDeleter {
  void operator()(void* memory) const { free(memory); }
};
using SharedMemory = std::unique_ptr<unsigned char, FreeDeleter>;

int order = simt_forward;
std::mt19937 generator;
std::string error_message;
cudaError_t error_code = cudaSuccess;

std::string describe(Site site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

std::string describe(const dim3& index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
         std::to_string(index.z) + ")";
}

bool same_site(Site a, Site b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

// One launch: its configuration, the block that runs now, and what has to outlive that block.
class Launch {
 public:
  Launch(const char* kernel_name, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
         void* arguments)
      : name_(kernel_name),
        grid_(grid),
        block_(block),
        shared_bytes_(shared_bytes),
        body_(body),
        arguments_(arguments) {}

  void run();

  // Called on a fiber.
  void barrier(Site site);
  unsigned meet(unsigned mask, uint64_t value, Site site, bool orders_memory, Meeting** met);
  void interleave();
  void thread_main();
  [[noreturn]] void fail(const std::string& what, Site site);

  unsigned char* shared() const { return shared_.back().get(); }
  int lane() const { return running_->number % kWarpSize; }

 private:
  bool valid_configuration() const;
  void begin_block(size_t block_index);
  void end_block();
  void run_block();
  Thread* next_thread();
  void resume(Thread& thread);
  void wait(State state, Site site);
  void release_barrier();
  Meeting& meeting_of(unsigned mask, Site site);
  void record(cudaError_t code, const std::string& message);
  void report_deadlock();

  const std::string name_;
  const dim3 grid_, block_;
  const size_t shared_bytes_;
  void (*const body_)(void*);
  void* const arguments_;

  std::vector<Thread> threads_;
  std::vector<std::deque<Meeting>> warps_;  // a deque, since threads point into it
  std::deque<std::unique_ptr<StackArena>> stacks_;
  std::deque<SharedMemory> shared_;
  std::deque<std::vector<std::deque<Meeting>>> past_warps_;
  Thread* running_ = nullptr;
  size_t live_ = 0, at_barrier_ = 0;
  size_t cursor_ = 0;
  Site barrier_site_{};
  bool failed_ = false;
  char begin_token_ = 0, end_token_ = 0;
  // Two for each block, used in turn: a fast thread may arrive at the next barrier before a slow
  // one has left the last, and must not seem to be ordered with it.
  std::deque<std::array<char, 2>> barrier_tokens_;
  unsigned barrier_generation_ = 0;
};

Launch* current = nullptr;

void fiber_entry() {
  Fiber::started();
  current->thread_main();
  abort();  // a finished fiber is never resumed
}

void Launch::record(cudaError_t code, const std::string& message) {
  failed_ = true;
  error_code = code;
  error_message = message + ", kernel " + name_;
}

void Launch::fail(const std::string& what, Site site) {
  record(cudaErrorLaunchFailure, what + " at " + describe(site) + ", block " +
                                     describe(indices.block) + " thread " +
                                     describe(indices.thread));
  running_->fiber.suspend(/*finished=*/false);
  abort();  // the launch is over: nobody resumes this fiber
}

bool Launch::valid_configuration() const {
  const size_t threads = static_cast<size_t>(block_.x) * block_.y * block_.z;
  return threads > 0 && threads <= kMaxThreads && block_.z <= 64 &&
         shared_bytes_ <= kMaxSharedBytes && grid_.x > 0 && grid_.x < 1u << 31 && grid_.y > 0 &&
         grid_.z > 0 && grid_.y <= kMaxGridYz && grid_.z <= kMaxGridYz;
}

void Launch::run() {
  if (!valid_configuration()) {
    record(cudaErrorInvalidConfiguration,
           "impossible launch: grid " + describe(grid_) + " block " + describe(block_) + " with " +
               std::to_string(shared_bytes_) + " bytes of shared memory");
    return;
  }
  threads_.resize(static_cast<size_t>(block_.x) * block_.y * block_.z);
  const size_t blocks = static_cast<size_t>(grid_.x) * grid_.y * grid_.z;
  std::vector<size_t> sequence(blocks);
  for (size_t i = 0; i < blocks; ++i) sequence[i] = order == simt_reverse ? blocks - 1 - i : i;
  if (order == simt_random) std::shuffle(sequence.begin(), sequence.end(), generator);
  for (size_t i = 0; i < blocks && !failed_; ++i) {
    begin_block(sequence[i]);
    run_block();
    end_block();
  }
  acquire_edge(&end_token_);
}

void Launch::begin_block(size_t block_index) {
#ifdef SIMT_TSAN
  // New addresses for every block: reused ones would look like races between blocks.
  stacks_.push_back(std::make_unique<StackArena>());
#else
  if (stacks_.empty()) stacks_.push_back(std::make_unique<StackArena>());
  shared_.clear();
  past_warps_.clear();
#endif
  stacks_.back()->reserve(threads_.size());
  // Exactly as much as was asked for, so that ASan sees an access behind it.
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, max<size_t>(shared_bytes_, 1)) != 0) abort();
  memset(memory, kPoison, shared_bytes_);
  shared_.emplace_back(static_cast<unsigned char*>(memory));
  past_warps_.push_back(std::move(warps_));
  warps_.assign((threads_.size() + kWarpSize - 1) / kWarpSize, {});
  barrier_tokens_.emplace_back();
  live_ = threads_.size();
  at_barrier_ = 0;
  cursor_ = 0;
  const dim3 block(block_index % grid_.x, block_index / grid_.x % grid_.y,
                   block_index / grid_.x / grid_.y);
  for (size_t i = 0; i < threads_.size(); ++i) {
    Thread& thread = threads_[i];
    thread.state = State::kReady;
    thread.number = static_cast<unsigned>(i);
    thread.indices = {dim3(i % block_.x, i / block_.x % block_.y, i / block_.x / block_.y), block,
                      block_, grid_};
    thread.fiber.prepare(fiber_entry, stacks_.back()->bottom(i), stacks_.back()->bytes());
  }
  release_edge(&begin_token_);
}

void Launch::end_block() {
  for (Thread& thread : threads_) thread.fiber.retire();
}

void Launch::run_block() {
  while (live_ > 0 && !failed_) {
    Thread* thread = next_thread();
    if (thread == nullptr) {
      report_deadlock();
      return;
    }
    resume(*thread);
  }
}

// The next thread that can run: cyclic in thread order, backwards, or any; none at a deadlock.
Thread* Launch::next_thread() {
  const size_t count = threads_.size();
  if (order == simt_random) cursor_ = generator() % count;
  for (size_t i = 0; i < count; ++i) {
    const size_t at = (cursor_ + i) % count;
    Thread& thread = threads_[order == simt_reverse ? count - 1 - at : at];
    if (thread.state == State::kReady) {
      cursor_ = at;
      return &thread;
    }
  }
  return nullptr;
}

void Launch::resume(Thread& thread) {
  running_ = &thread;
  indices = thread.indices;
  thread.fiber.resume();
}

void Launch::thread_main() {
  acquire_edge(&begin_token_);
  body_(arguments_);
  release_edge(&end_token_);
  running_->state = State::kFinished;
  --live_;
  if (live_ > 0 && at_barrier_ == live_) release_barrier();
  running_->fiber.suspend(/*finished=*/true);
}

void Launch::wait(State state, Site site) {
  running_->state = state;
  running_->site = site;
  running_->fiber.suspend(/*finished=*/false);
}

void Launch::interleave() {
  if (order == simt_random) running_->fiber.suspend(/*finished=*/false);
}

// Threads that have returned count as arrived, as on every GPU since Volta.
void Launch::barrier(Site site) {
  if (at_barrier_ == 0) {
    barrier_site_ = site;
  } else if (!same_site(barrier_site_, site)) {
    fail("divergent __syncthreads: other threads wait at " + describe(barrier_site_) +
             ", this one came to the one",
         site);
  }
  char* const token = &barrier_tokens_.back()[barrier_generation_ & 1];
  release_edge(token);
  if (++at_barrier_ == live_) {
    release_barrier();
    interleave();
  } else {
    wait(State::kAtBarrier, site);
  }
  acquire_edge(token);
}

void Launch::release_barrier() {
  for (Thread& thread : threads_) {
    if (thread.state == State::kAtBarrier) thread.state = State::kReady;
  }
  at_barrier_ = 0;
  ++barrier_generation_;
}

Meeting& Launch::meeting_of(unsigned mask, Site site) {
  const unsigned first = running_->number / kWarpSize * kWarpSize;
  const size_t lanes = min<size_t>(threads_.size() - first, kWarpSize);
  const unsigned existing = lanes == kWarpSize ? kWholeWarp : (1u << lanes) - 1;
  if ((mask >> lane() & 1) == 0) fail("a lane calls a collective without being in its mask", site);
  // Lanes that were never launched may be named; lanes that returned may not, and are waited for.
  mask &= existing;
  std::deque<Meeting>& meetings = warps_[running_->number / kWarpSize];
  for (Meeting& meeting : meetings) {
    if (meeting.mask == mask) return meeting;
  }
  meetings.emplace_back().mask = mask;
  return meetings.back();
}

// Waits for all lanes of the mask; returns which set of values is theirs.
unsigned Launch::meet(unsigned mask, uint64_t value, Site site, bool orders_memory, Meeting** met) {
  Meeting& meeting = meeting_of(mask, site);
  *met = &meeting;
  if (meeting.arrived == 0) {
    meeting.site = site;
  } else if (!same_site(meeting.site, site)) {
    fail("lanes of one mask call different collectives: others wait at " + describe(meeting.site) +
             ", this one came to the one",
         site);
  }
  const unsigned parity = meeting.generation & 1;
  meeting.values[parity][lane()] = value;
  meeting.arrived |= 1u << lane();
  if (orders_memory) release_edge(meeting.values[parity]);
  if (meeting.arrived == meeting.mask) {
    meeting.arrived = 0;
    ++meeting.generation;
    for (Thread& thread : threads_) {
      if (thread.state == State::kInCollective && thread.meeting == &meeting) {
        thread.state = State::kReady;
      }
    }
    interleave();
  } else {
    running_->meeting = &meeting;
    wait(State::kInCollective, site);
  }
  if (orders_memory) acquire_edge(meeting.values[parity]);
  return parity;
}

void Launch::report_deadlock() {
  std::string message = "deadlock in block " + describe(indices.block) + ":";
  for (const State state : {State::kAtBarrier, State::kInCollective}) {
    size_t waiting = 0;
    const Thread* first = nullptr;
    for (const Thread& thread : threads_) {
      if (thread.state != state) continue;
      if (waiting++ == 0) first = &thread;
    }
    if (first == nullptr) continue;
    message += " " + std::to_string(waiting) + " threads wait in " +
               (state == State::kAtBarrier ? "__syncthreads" : "a warp collective") +
               ", the first is " + describe(first->indices.thread) + " at " +
               describe(first->site) + ";";
  }
  message.back() = ' ';
  record(cudaErrorLaunchFailure,
         message + "and " + std::to_string(threads_.size() - live_) + " threads have returned");
}

}  // namespace

void launch(const char* kernel_name, dim3 grid, dim3 block, size_t shared_bytes,
            void (*body)(void*), void* arguments) {
  Launch launch(kernel_name, grid, block, shared_bytes, body, arguments);
  current = &launch;
  launch.run();
  current = nullptr;
}

unsigned char* dynamic_shared() { return current->shared(); }

cudaError_t take_last_error() {
  const cudaError_t code = error_code;
  error_code = cudaSuccess;
  return code;
}

void block_barrier(Site site) { current->barrier(site); }

void warp_barrier(unsigned mask, Site site) {
  Meeting* meeting = nullptr;
  current->meet(mask, 0, site, /*orders_memory=*/true, &meeting);
}

uint64_t exchange(unsigned mask, uint64_t value, int source, Site site) {
  Meeting* meeting = nullptr;
  const unsigned parity = current->meet(mask, value, site, /*orders_memory=*/false, &meeting);
  if ((meeting->mask >> source & 1) == 0) {
    current->fail("a shuffle reads lane " + std::to_string(source) + ", which its mask leaves out",
                  site);
  }
  return meeting->values[parity][source];
}

unsigned ballot(unsigned mask, bool predicate, Site site) {
  Meeting* meeting = nullptr;
  const unsigned parity = current->meet(mask, predicate, site, /*orders_memory=*/false, &meeting);
  unsigned votes = 0;
  for (int i = 0; i < kWarpSize; ++i) {
    if (meeting->mask >> i & 1) votes |= static_cast<unsigned>(meeting->values[parity][i]) << i;
  }
  return votes;
}

void interleave() { current->interleave(); }

int lane() { return current->lane(); }

}  // namespace simt

void simt_set_order(int order, unsigned seed) {
  simt::order = order;
  simt::generator.seed(seed);
  simt::error_message.clear();
  simt::error_code = cudaSuccess;
}

const char* simt_error() { return simt::error_message.c_str(); }
