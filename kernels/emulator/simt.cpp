// Runs launches: which blocks are resident, whose turn it is, and what ended it all. Never
// instrumented itself, also where the kernels are: a sanitizer sees the kernels' accesses and,
// through fiber.h, what orders them.
//
// Of launches TSan is told: one begins after its caller, and after the one before it on its stream;
// the caller goes on after all. Blocks of one launch, and launches on two streams, are unordered.
#include "simt.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <random>
#include <thread>
#include <utility>

#include "block.h"

namespace simt {

ThreadIndices indices;

namespace {

constexpr size_t kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 48 << 10;  // what a kernel gets without asking for more
constexpr unsigned kMaxGridYz = 65535;
// Polls of each thread, on average, after which flags that nobody sets are taken for a deadlock.
constexpr size_t kPolls = 1000;
// What other processes get, if they may set them, after one poll of each.
constexpr std::chrono::microseconds kNap(50);

int order = simt_forward;
std::chrono::milliseconds patience(0);  // with other processes; 0 where there are none
std::mt19937 generator;
std::string error_message;
cudaError_t error_code = cudaSuccess;

struct Launch {
  Shape shape;
  std::function<void()> body;
  Launch* previous;  // on its stream
  char begin_token = 0, end_token = 0;
};

void record(cudaError_t code, const std::string& message) {
  error_code = code;
  error_message = message;
}

bool valid(const Shape& shape) {
  const dim3 grid = shape.grid;
  return shape.threads() > 0 && shape.threads() <= kMaxThreads && shape.block.z <= 64 &&
         shape.shared_bytes <= kMaxSharedBytes && grid.x > 0 && grid.x < 1u << 31 && grid.y > 0 &&
         grid.z > 0 && grid.y <= kMaxGridYz && grid.z <= kMaxGridYz;
}

// The order in which the blocks of a launch start.
std::vector<size_t> sequence_of(const Launch& launch) {
  std::vector<size_t> sequence(launch.shape.blocks());
  for (size_t i = 0; i < sequence.size(); ++i) {
    sequence[i] = order == simt_reverse ? sequence.size() - 1 - i : i;
  }
  if (order == simt_random) std::shuffle(sequence.begin(), sequence.end(), generator);
  return sequence;
}

// Blocks of one launch that are resident together.
struct Batch {
  Launch* launch;
  std::vector<size_t> blocks;
};

class Machine final : public Scheduler {
 public:
  // Runs each queue's batches one after another and the queues, each a device, at once, at a pace
  // of their own; false if that was a failure.
  bool run(std::vector<std::deque<Batch>> queues);

  void suspend() override { running_->fiber.suspend(/*finished=*/false); }
  void interleave() override {
    if (order == simt_random) suspend();
  }
  void note_progress() override {
    idle_polls_ = 0;
    naps_ = false;
  }
  [[noreturn]] void fail(const std::string& what, Site site) override;

  void poll(Site site);
  void thread_main();
  Thread& running() { return *running_; }

 private:
  struct Entry {
    Thread* thread;
    Launch* launch;
    size_t queue;
  };
  // What runs of one queue.
  struct Device {
    std::vector<std::unique_ptr<Block>> blocks;
    size_t threads = 0;
    size_t left = 0;  // threads that have not finished
  };

  std::unique_ptr<StackArena> stacks();
  void admit(size_t queue, const Batch& batch);
  void retire(size_t queue);
  bool next_thread();
  bool polls_in_vain();
  void report_stuck(const std::string& what);

  std::vector<Entry> entries_;  // all threads of all devices
  std::vector<Device> devices_;
#ifdef SIMT_TSAN
  // Kept until all is over: addresses used again would look like races between blocks.
  std::vector<std::unique_ptr<Block>> past_;
  std::vector<std::unique_ptr<StackArena>> past_stacks_;
#endif
  std::vector<std::unique_ptr<StackArena>> spare_stacks_;
  Thread* running_ = nullptr;
  Launch* running_launch_ = nullptr;
  size_t cursor_ = 0;
  size_t idle_polls_ = 0;
  bool naps_ = false;  // between looks at what other processes do, and since when
  std::chrono::steady_clock::time_point naps_since_;
  size_t favourite_ = 0;  // in a random order, the device whose turn it is
  bool failed_ = false;
};

Machine* machine = nullptr;

void fiber_entry() {
  Fiber::started();
  machine->thread_main();
  abort();  // a finished fiber is never resumed
}

void Machine::fail(const std::string& what, Site site) {
  failed_ = true;
  record(cudaErrorLaunchFailure,
         what + " at " + describe(site) + ", block " + describe(indices.block) + " thread " +
             describe(indices.thread) + ", kernel " + running_launch_->shape.kernel);
  suspend();
  abort();  // it is over: nobody resumes this fiber
}

std::unique_ptr<StackArena> Machine::stacks() {
  if (spare_stacks_.empty()) return std::make_unique<StackArena>();
  auto stacks = std::move(spare_stacks_.back());
  spare_stacks_.pop_back();
  return stacks;
}

bool Machine::run(std::vector<std::deque<Batch>> queues) {
  devices_ = std::vector<Device>(queues.size());
  cursor_ = idle_polls_ = 0;
  favourite_ = generator() % queues.size();
  const auto admit_next = [&](size_t queue) {
    if (queues[queue].empty()) return;
    admit(queue, queues[queue].front());
    queues[queue].pop_front();
  };
  for (size_t queue = 0; queue < queues.size(); ++queue) admit_next(queue);
  while (!entries_.empty() && !failed_) {
    if (!next_thread()) {
      report_stuck("deadlock");
      break;
    }
    const Entry entry = entries_[cursor_];
    running_ = entry.thread;
    running_launch_ = entry.launch;
    indices = entry.thread->indices;
    entry.thread->fiber.resume();
    if (entry.thread->polls) {
      // The next one's turn, or a fixed order would come back to this one for ever.
      if (++cursor_ == entries_.size()) cursor_ = 0;
      if (polls_in_vain()) {
        const std::string how_long = std::to_string(patience.count());
        report_stuck("no progress" + (patience.count() > 0 ? " for " + how_long + " ms" : ""));
      }
    }
    if (entry.thread->state == State::kFinished && --devices_[entry.queue].left == 0) {
      retire(entry.queue);
      admit_next(entry.queue);
    }
  }
  for (size_t queue = 0; queue < queues.size(); ++queue) retire(queue);
  return !failed_;
}

void Machine::admit(size_t queue, const Batch& batch) {
  Device& device = devices_[queue];
  for (const size_t index : batch.blocks) {
    auto block = std::make_unique<Block>(batch.launch->shape, index, stacks(), fiber_entry, *this);
    const size_t count = block->threads().size();
    for (size_t i = 0; i < count; ++i) {
      Thread& thread = block->threads()[order == simt_reverse ? count - 1 - i : i];
      entries_.push_back({&thread, batch.launch, queue});
    }
    device.threads += count;
    device.blocks.push_back(std::move(block));
  }
  device.left = device.threads;
}

void Machine::retire(size_t queue) {
  Device& device = devices_[queue];
  size_t kept = 0, cursor = 0;
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (i == cursor_) cursor = kept;
    if (entries_[i].queue != queue) entries_[kept++] = entries_[i];
  }
  entries_.resize(kept);
  cursor_ = cursor < kept ? cursor : 0;
  for (auto& block : device.blocks) {
    auto stacks = block->retire();
#ifdef SIMT_TSAN
    past_.push_back(std::move(block));
    past_stacks_.push_back(std::move(stacks));
#else
    spare_stacks_.push_back(std::move(stacks));
#endif
  }
  device = Device();
}

// Moves the cursor to the next thread that can run; false at a deadlock. Cyclic in a fixed order.
// In a random one devices drift apart: one of them has its turn, for as long as its threads need to
// be resumed some times each, and the others go on only where it waits.
bool Machine::next_thread() {
  const size_t count = entries_.size();
  if (order == simt_random) {
    if (devices_.size() > 1 && generator() % (4 * devices_[favourite_].threads + 1) == 0) {
      favourite_ = generator() % devices_.size();
    }
    cursor_ = generator() % count;
  }
  size_t found = count;
  for (size_t i = 0; i < count; ++i) {
    const size_t at = (cursor_ + i) % count;
    if (entries_[at].thread->state != State::kReady) continue;
    if (order != simt_random || entries_[at].queue == favourite_) {
      cursor_ = at;
      return true;
    }
    if (found == count) found = at;
  }
  if (found == count) return false;
  cursor_ = found;
  return true;
}

void Machine::thread_main() {
  acquire_edge(&running_launch_->begin_token);
  if (running_launch_->previous != nullptr) acquire_edge(&running_launch_->previous->end_token);
  Launch* const launch = running_launch_;
  launch->body();
  release_edge(&launch->end_token);
  running_->block->finish(*running_);
  running_->fiber.suspend(/*finished=*/true);
}

void Machine::poll(Site site) {
  Thread& self = *running_;
  ++idle_polls_;
  self.polls = true;
  self.site = site;
  suspend();
  self.polls = false;
}

// Whether the flags that threads poll are taken for ones that nobody sets.
bool Machine::polls_in_vain() {
  if (patience.count() == 0) return idle_polls_ > kPolls * entries_.size();
  if (idle_polls_ <= entries_.size()) return false;
  const auto now = std::chrono::steady_clock::now();
  if (!std::exchange(naps_, true)) naps_since_ = now;
  if (now - naps_since_ > patience) return true;
  std::this_thread::sleep_for(kNap);
  idle_polls_ = 0;
  return false;
}

void Machine::report_stuck(const std::string& what) {
  struct Group {
    const char* doing;
    size_t count = 0;
    const Thread* first = nullptr;
  } groups[] = {{"wait in __syncthreads"}, {"wait in a warp collective"}, {"poll a flag"}};
  size_t returned = 0;
  for (const Entry& entry : entries_) {
    const Thread* const thread = entry.thread;
    if (thread->state == State::kFinished) ++returned;
    Group* const group = thread->state == State::kAtBarrier      ? &groups[0]
                         : thread->state == State::kInCollective ? &groups[1]
                         : thread->polls                         ? &groups[2]
                                                                 : nullptr;
    if (group != nullptr && group->count++ == 0) group->first = thread;
  }
  std::string message = what + " in kernel " + running_launch_->shape.kernel + ":";
  for (const Group& group : groups) {
    if (group.count == 0) continue;
    message += " " + std::to_string(group.count) + " threads " + group.doing + ", the first is " +
               describe(group.first->indices.thread) + " of block " +
               describe(group.first->indices.block) + " at " + describe(group.first->site) + ";";
  }
  message.back() = ' ';
  failed_ = true;
  record(cudaErrorLaunchFailure,
         message + "and " + std::to_string(returned) + " threads have returned");
}

// Launches that wait for `simt_synchronize`, by stream.
bool deferring = false;
std::map<void*, std::deque<std::unique_ptr<Launch>>> streams;

// Alone on the device. Its blocks run one after another, for none may wait for another; they may
// wait for those of another process, which has an order of its own, and then they run together.
void run_alone(Launch& launch) {
  std::deque<Batch> queue;
  if (patience.count() > 0) {
    queue.push_back({&launch, sequence_of(launch)});
  } else {
    for (const size_t index : sequence_of(launch)) queue.push_back({&launch, {index}});
  }
  Machine own;
  machine = &own;
  own.run({std::move(queue)});
  machine = nullptr;
  acquire_edge(&launch.end_token);
}

}  // namespace

void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            std::function<void()> body) {
  auto launch = std::make_unique<Launch>();
  launch->shape = {kernel, grid, block, shared_bytes};
  launch->body = std::move(body);
  launch->previous = nullptr;
  if (!valid(launch->shape)) {
    record(cudaErrorInvalidConfiguration,
           "impossible launch: grid " + describe(grid) + " block " + describe(block) + " with " +
               std::to_string(shared_bytes) + " bytes of shared memory, kernel " + kernel);
    return;
  }
  release_edge(&launch->begin_token);
  if (!deferring) {
    run_alone(*launch);
    return;
  }
  auto& queue = streams[stream];
  if (!queue.empty()) launch->previous = queue.back().get();
  queue.push_back(std::move(launch));
}

unsigned char* dynamic_shared() { return machine->running().block->shared(); }

cudaError_t take_last_error() { return std::exchange(error_code, cudaSuccess); }

void block_barrier(Site site) {
  Thread& self = machine->running();
  self.block->barrier(self, site);
}

void warp_barrier(unsigned mask, Site site) {
  Thread& self = machine->running();
  Meeting* meeting = nullptr;
  self.block->meet(self, mask, 0, site, /*orders_memory=*/true, &meeting);
}

uint64_t exchange(unsigned mask, uint64_t value, int source, Site site) {
  Thread& self = machine->running();
  Meeting* meeting = nullptr;
  const unsigned parity =
      self.block->meet(self, mask, value, site, /*orders_memory=*/false, &meeting);
  if ((meeting->mask >> source & 1) == 0) {
    fail("a shuffle reads lane " + std::to_string(source) + ", which its mask leaves out", site);
  }
  return meeting->values[parity][source];
}

unsigned ballot(unsigned mask, bool predicate, Site site) {
  Thread& self = machine->running();
  Meeting* meeting = nullptr;
  const unsigned parity =
      self.block->meet(self, mask, predicate, site, /*orders_memory=*/false, &meeting);
  unsigned votes = 0;
  for (int i = 0; i < kWarpSize; ++i) {
    if (meeting->mask >> i & 1) votes |= static_cast<unsigned>(meeting->values[parity][i]) << i;
  }
  return votes;
}

Gathered gather(uint64_t value, Site site) {
  Thread& self = machine->running();
  Meeting* meeting = nullptr;
  const unsigned parity =
      self.block->meet(self, kWholeWarp, value, site, /*orders_memory=*/false, &meeting);
  if (meeting->mask != kWholeWarp) fail("a tensor-core operation in a warp of few lanes", site);
  Gathered gathered;
  memcpy(gathered.lane, meeting->values[parity], sizeof(gathered.lane));
  return gathered;
}

void check_shared(const void* address, size_t bytes, const char* what, Site site) {
  if (!machine->running().block->owns(address, bytes)) {
    fail(std::string(what) + " outside the block's shared memory", site);
  }
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail(std::string(what) + " an address that is not aligned to " + std::to_string(bytes) +
             " bytes",
         site);
  }
}

void begin_copy(AsyncCopy copy) { machine->running().issued.push_back(copy); }

void commit_copies() {
  Thread& self = machine->running();
  self.groups.push_back(std::exchange(self.issued, {}));
}

bool take_copy(int pending, AsyncCopy* copy) {
  auto& groups = machine->running().groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    std::vector<AsyncCopy>& oldest = groups.front();
    if (oldest.empty()) {
      groups.pop_front();
      continue;
    }
    *copy = oldest.back();
    oldest.pop_back();
    return true;
  }
  return false;
}

void poll(Site site) { machine->poll(site); }
void note_progress() { machine->note_progress(); }
void interleave() { machine->interleave(); }
void fail(const std::string& what, Site site) { machine->fail(what, site); }
int lane() { return machine->running().lane(); }

}  // namespace simt

void simt_set_order(int order, unsigned seed) {
  simt::order = order;
  simt::generator.seed(seed);
  simt::error_message.clear();
  simt::error_code = cudaSuccess;
  simt::deferring = false;
  simt::streams.clear();
}

void simt_set_patience(int milliseconds) {
  simt::patience = std::chrono::milliseconds(milliseconds);
}

const char* simt_error() { return simt::error_message.c_str(); }

void simt_defer() { simt::deferring = true; }

int simt_synchronize() {
  using namespace simt;
  Machine own;
  machine = &own;
  std::vector<std::deque<Batch>> queues;
  for (auto& [stream, queue] : streams) {
    queues.emplace_back();
    for (auto& launch : queue) queues.back().push_back({launch.get(), sequence_of(*launch)});
  }
  own.run(std::move(queues));
  machine = nullptr;
  for (auto& [stream, queue] : streams) {
    for (auto& launch : queue) acquire_edge(&launch->end_token);
  }
  streams.clear();
  deferring = false;
  return take_last_error();
}
