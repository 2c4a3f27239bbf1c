// A device that is not the CPU, on the CPU: torch's PrivateUse1 backend, named "sim" by __init__.py.
//
// As on a GPU, tensors have storages of their own device, `.numpy()` fails, operators that mix devices fail, and memory is counted
// and can run out: by a caching allocator that reserves segments as CUDA's does, below a limit that can be set. Every operator runs
// its CPU kernel on the same bytes. What some accelerators refuse is refused: `random_` over all of int64, adaptive pooling that does
// not divide (both as on MPS). Convolutions take a workspace, and the first run of each operator loads code that stays.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

constexpr auto SIM = c10::DeviceType::PrivateUse1;
constexpr int DEVICES = 2;
constexpr size_t MIB = size_t(1) << 20;
constexpr size_t CONTEXT = 24 * MIB;
constexpr size_t CODE = 64 << 10;  // of an operator, loaded when it first runs

// ---- memory ----------------------------------------------------------------------------------------------------------------------

struct Block {
  char* begin;
  size_t size;
  bool used;
  Block *before, *after;
  bool small;
};

struct Less {
  bool operator()(const Block* a, const Block* b) const { return a->size != b->size ? a->size < b->size : a->begin < b->begin; }
};

struct Device {
  size_t total = 1024 * MIB, others = 0, limit = SIZE_MAX, code = 0;
  size_t allocated = 0, reserved = 0, most_allocated = 0, most_reserved = 0;
  int64_t fails = -1;  // the allocation that fails, counted down; -1: none
  int64_t allocations = 0;
  bool begun = false;
  std::set<Block*, Less> free[2];
  std::unordered_map<void*, Block*> used;
  std::set<std::string> loaded;

  size_t context() const { return begun ? CONTEXT + code : 0; }

  void release() {  // whole segments that are free go back
    for (auto& pool : free) {
      std::vector<Block*> whole;
      for (auto* block : pool)
        if (!block->before && !block->after) whole.push_back(block);
      for (auto* block : whole) {
        pool.erase(block);
        reserved -= block->size;
        std::free(block->begin);
        delete block;
      }
    }
  }

  void* take(size_t asked) {
    begun = true;
    if (!asked) return nullptr;
    allocations++;
    size_t size = (asked + 511) / 512 * 512;
    bool small = size <= MIB;
    auto& pool = free[small];
    if (fails >= 0 && fails-- == 0) refuse(size);
    Block want{nullptr, size, false, nullptr, nullptr, small};
    auto found = pool.lower_bound(&want);
    Block* block;
    if (found != pool.end()) {
      block = *found;
      pool.erase(found);
    } else {
      size_t segment = small ? 2 * MIB : size < 10 * MIB ? 20 * MIB : (size + 2 * MIB - 1) / (2 * MIB) * (2 * MIB);
      if (!room(segment)) release();
      if (!room(segment)) refuse(size);
      reserved += segment;
      most_reserved = std::max(most_reserved, reserved);
      block = new Block{static_cast<char*>(std::aligned_alloc(512, segment)), segment, false, nullptr, nullptr, small};
    }
    if (size_t rest = block->size - size; small ? rest >= 512 : rest > MIB) {
      auto* behind = new Block{block->begin + size, rest, false, block, block->after, small};
      if (block->after) block->after->before = behind;
      block->after = behind;
      block->size = size;
      pool.insert(behind);
    }
    block->used = true;
    used[block->begin] = block;
    allocated += block->size;
    most_allocated = std::max(most_allocated, allocated);
    return block->begin;
  }

  bool room(size_t segment) const { return reserved + segment <= limit && reserved + segment + context() + others <= total; }

  void refuse(size_t size) const {
    TORCH_CHECK_WITH(OutOfMemoryError, false, "sim out of memory. Tried to allocate ", size, " bytes. ", reserved, " are reserved.");
  }

  void give(void* pointer) {
    auto found = used.find(pointer);
    Block* block = found->second;
    used.erase(found);
    allocated -= block->size;
    block->used = false;
    auto& pool = free[block->small];
    if (auto* behind = block->after; behind && !behind->used) {
      pool.erase(behind);
      block->size += behind->size;
      block->after = behind->after;
      if (block->after) block->after->before = block;
      delete behind;
    }
    if (auto* front = block->before; front && !front->used) {
      pool.erase(front);
      front->size += block->size;
      front->after = block->after;
      if (front->after) front->after->before = front;
      delete block;
      block = front;
    }
    pool.insert(block);
  }
};

std::recursive_mutex lock;
Device devices[DEVICES];
thread_local c10::DeviceIndex current = 0;

struct Back {  // at its end the current device is what it was, also where memory ran out
  c10::DeviceIndex before = current;
  ~Back() { current = before; }
};

struct Place {
  int device;
  void* pointer;
};

void give(void* context) {
  std::lock_guard<std::recursive_mutex> held(lock);
  auto* place = static_cast<Place*>(context);
  if (place->pointer) devices[place->device].give(place->pointer);
  delete place;
}

struct SimAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    std::lock_guard<std::recursive_mutex> held(lock);
    void* pointer = devices[current].take(size);
    return {pointer, new Place{current, pointer}, &give, c10::Device(SIM, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
};

SimAllocator allocator;
REGISTER_ALLOCATOR(SIM, &allocator);

// ---- device, generator, hooks ----------------------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = SIM;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return SIM; }
  c10::Device exchangeDevice(c10::Device d) const override {
    auto before = getDevice();
    setDevice(d);
    return before;
  }
  c10::Device getDevice() const override { return {SIM, current}; }
  void setDevice(c10::Device d) const override {
    TORCH_CHECK(d.index() < DEVICES, "sim: invalid device ordinal ", int(d.index()));
    if (d.index() >= 0) current = d.index();
  }
  void uncheckedSetDevice(c10::Device d) const noexcept override {
    if (d.index() >= 0) current = d.index();
  }
  c10::Stream getStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream getDefaultStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return c10::Stream(c10::Stream::DEFAULT, s.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct SimGenerator final : c10::GeneratorImpl {
  at::Generator host;
  SimGenerator(c10::DeviceIndex index, at::Generator host)
      : c10::GeneratorImpl(c10::Device(SIM, index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), host(std::move(host)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "sim: no offsets"); }
  uint64_t get_offset() const override { TORCH_CHECK(false, "sim: no offsets"); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return const_cast<at::Generator&>(host).seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  SimGenerator* clone_impl() const override { return new SimGenerator(device().index(), host.clone()); }
};

at::Generator& default_generator(c10::DeviceIndex index) {
  static std::map<int, at::Generator> made;
  auto found = made.find(index);
  if (found == made.end())
    found = made.emplace(index, at::make_generator<SimGenerator>(index, at::detail::createCPUGenerator(1234))).first;
  return found->second;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  c10::Device getDeviceFromPtr(void*) const override { return {SIM, current}; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    return default_generator(index < 0 ? current : index);
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<SimGenerator>(index < 0 ? current : index, at::detail::createCPUGenerator());
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    Back back;
    current = storage.device().index();
    auto fresh = allocator.allocate(bytes);
    std::memcpy(fresh.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(fresh));
    storage.set_nbytes(bytes);
  }
  void init() const override {}
};

// ---- every operator on the host --------------------------------------------------------------------------------------------------

bool is_sim(const at::Tensor& t) { return t.defined() && t.device().type() == SIM; }

struct Crossing {  // of one call: host tensors on the same bytes, and the way back
  std::map<c10::StorageImpl*, std::pair<c10::Storage, at::Tensor>> storages;  // sim's to the host's, and a tensor that has it
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;                      // sim, host
  c10::DeviceIndex index = -1;

  at::Tensor host(const at::Tensor& t) {
    for (auto& [sim, made] : pairs)
      if (sim.is_same(t)) return made;
    if (index < 0) index = t.device().index();
    TORCH_CHECK(index == t.device().index(), "Expected all tensors to be on the same device, but found sim:", int(index), " and ", t.device());
    auto* key = t.storage().unsafeGetStorageImpl();
    auto found = storages.find(key);
    if (found == storages.end()) {
      c10::DataPtr bytes(const_cast<void*>(t.storage().data()), c10::Device(c10::kCPU));
      c10::Storage storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(bytes), c10::GetAllocator(c10::kCPU), true);
      found = storages.emplace(key, std::make_pair(storage, t)).first;
    }
    auto made = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(found->second.first), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
    auto* impl = made.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    if (t.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    pairs.emplace_back(t, made);
    return made;
  }

  at::Tensor back(const at::Tensor& t) {
    if (!t.defined() || t.device().type() == SIM) return t;
    for (auto& [sim, made] : pairs)
      if (made.is_same(t)) return sim;
    for (auto& [key, both] : storages)
      if (both.first.unsafeGetStorageImpl() == t.storage().unsafeGetStorageImpl() && t.storage().nbytes()) {  // a view
        auto view = at::detail::make_tensor<c10::TensorImpl>(
            c10::TensorImpl::VIEW, c10::Storage(both.second.storage()), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), t.dtype());
        view.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
        return view;
      }
    Back back;
    current = index < 0 ? current : index;
    auto made = at::detail::empty_strided_generic(
        t.sizes(), t.strides(), &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), t.scalar_type());
    if (made.storage().nbytes()) std::memcpy(made.mutable_data_ptr(), t.const_data_ptr(), made.storage().nbytes());
    return made;
  }

  void resized() {  // results that were given and did not have the size
    for (auto& [sim, made] : pairs) {
      if (sim.sizes() == made.sizes() && sim.strides() == made.strides()) continue;
      size_t bytes = made.storage().nbytes();
      auto* impl = sim.unsafeGetTensorImpl();
      if (bytes > sim.storage().nbytes()) {
        Back back;
        current = sim.device().index();
        auto fresh = allocator.allocate(bytes);
        sim.storage().set_data_ptr_noswap(std::move(fresh));
        sim.storage().set_nbytes(bytes);
      }
      impl->set_sizes_and_strides(made.sizes(), made.strides(), made.storage_offset());
      if (made.storage().data() != sim.storage().data() && bytes)
        std::memcpy(const_cast<void*>(sim.storage().data()), made.storage().data(), bytes);
    }
  }
};

void load_code(const std::string& name) {
  std::lock_guard<std::recursive_mutex> held(lock);
  auto& device = devices[current];
  device.begun = true;
  if (device.loaded.insert(name).second) device.code += CODE;
}

void everything(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = schema.name();
  Crossing crossing;
  size_t count = schema.arguments().size(), begin = stack->size() - count;
  bool strangers = false;
  auto cross = [&](const at::Tensor& t) -> at::Tensor {
    if (is_sim(t)) return crossing.host(t);
    if (t.defined() && t.dim()) strangers = true;
    return t;
  };
  for (size_t i = 0; i < count; i++) {
    auto& value = (*stack)[begin + i];
    if (value.isTensor()) {
      value = cross(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const auto& t : value.toTensorVector()) list.push_back(cross(t));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& t : value.toOptionalTensorList().vec()) list.push_back(t ? std::optional<at::Tensor>(cross(*t)) : t);
      value = list;
    } else if (value.isDevice() && value.toDevice().type() == SIM) {
      crossing.index = value.toDevice().has_index() ? value.toDevice().index() : current;
      value = c10::Device(c10::kCPU);
    } else if (value.isGenerator()) {
      auto generator = value.toGenerator();
      if (generator.device().type() == SIM) value = static_cast<SimGenerator*>(generator.unsafeGetGeneratorImpl())->host;
      else TORCH_CHECK(false, "Expected a 'sim' device type for generator but found '", generator.device(), "'");
    }
  }
  bool indexing = name.find("index") != std::string::npos;  // by indices on the host, as on CUDA
  TORCH_CHECK(!strangers || crossing.pairs.empty() || indexing,
              "Expected all tensors to be on the same device, but found at least two devices, sim:0 and cpu! (", name, ")");
  if (name == "aten::random_" && schema.overload_name() == "from")
    TORCH_CHECK(!(*stack)[begin + 2].isNone(), "random_: sim has no numbers of all 64 bits");
  if (name == "aten::_adaptive_avg_pool2d") {
    auto to = (*stack)[begin + 1].toIntVector();
    auto x = (*stack)[begin].toTensor();
    TORCH_CHECK(x.size(-1) % to[1] == 0 && x.size(-2) % to[0] == 0, "Adaptive pool sim: input sizes must be divisible by output sizes.");
  }
  for (size_t i = 0; i < count; i++)  // whoever names no generator draws from the device's own
    if (schema.arguments()[i].name() == "generator" && (*stack)[begin + i].isNone())
      (*stack)[begin + i] = static_cast<SimGenerator*>(default_generator(crossing.index < 0 ? current : crossing.index).unsafeGetGeneratorImpl())->host;
  load_code(name);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  crossing.resized();
  size_t returns = schema.returns().size();
  for (size_t i = stack->size() - returns; i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = crossing.back(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const auto& t : value.toTensorVector()) list.push_back(crossing.back(t));
      value = list;
    }
  }
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> device,
                 std::optional<bool>, std::optional<at::MemoryFormat> format) {
  Back back;
  if (device && device->has_index()) current = device->index();
  TORCH_CHECK(current < DEVICES, "sim: invalid device ordinal ", int(current));
  auto made = at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                        c10::dtype_or_default(dtype), format);
  return made;
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  Back back;
  if (device && device->has_index()) current = device->index();
  auto made = at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
                                                c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
  return made;
}

// Zeros of forward-mode, which have no bytes: the same code as for the CPU.
at::Tensor zeros_without_bytes(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                               std::optional<at::Device> device, std::optional<bool>) {
  c10::Device where(SIM, device && device->has_index() ? device->index() : current);
  at::native::ZeroTensorAllocator nothing(where);
  auto keys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1) | c10::DispatchKeySet(c10::DispatchKey::ZeroTensor);
  return at::detail::empty_generic(size, &nothing, keys, c10::dtype_or_default(dtype), std::nullopt);
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  Crossing a, b;  // two: from one device of this kind to another is allowed
  auto target = is_sim(to) ? a.host(to) : to;
  target.copy_(is_sim(from) ? b.host(from) : from);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) const_cast<at::Tensor&>(to).resize_(from.sizes());
  return copy_from(from, to, false);
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  Crossing crossing;
  auto made = crossing.host(self);
  made.resize_(C10_AS_INTARRAYREF_SLOW(size), format);
  crossing.resized();
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

at::Tensor& set_whole(at::Tensor& self, at::Storage source) {
  int64_t count = int64_t(source.nbytes() / self.dtype().itemsize());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(at::IntArrayRef{count}, at::IntArrayRef{1});
  return self;
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  auto at = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), at);
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor workspace(const at::Tensor& like) { return at::empty({int64_t(like.nbytes() / 2)}, like.options().dtype(at::kByte)); }

at::Tensor convolution(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias, c10::SymIntArrayRef stride,
                       c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
                       c10::SymInt groups) {
  TORCH_CHECK(is_sim(x) && is_sim(w) && (!bias || !bias->defined() || is_sim(*bias)), "Expected all tensors to be on the same device, sim and cpu (convolution)");
  load_code("convolution");
  auto needed = workspace(x);
  Crossing crossing;
  auto hosted = bias && bias->defined() ? std::optional<at::Tensor>(crossing.host(*bias)) : std::nullopt;
  auto made = at::convolution_symint(crossing.host(x), crossing.host(w), hosted, stride, padding, dilation, transposed, output_padding, groups);
  return crossing.back(made);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& x, const at::Tensor& w, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups, std::array<bool, 3> mask) {
  load_code("convolution_backward");
  auto needed = workspace(x);
  Crossing crossing;
  std::vector<c10::SymInt> sizes{transposed ? w.sym_size(1) * groups : w.sym_size(0)};
  auto [a, b, c] = at::convolution_backward_symint(crossing.host(gradient), crossing.host(x), crossing.host(w), c10::SymIntArrayRef(sizes), stride,
                                                   padding, dilation, transposed, output_padding, groups, mask);
  return {crossing.back(a), crossing.back(b), crossing.back(c)};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&everything>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("_efficientzerotensor", TORCH_FN(zeros_without_bytes));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("resize_", TORCH_FN(resize));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Storage", TORCH_FN(set_whole));
  m.impl("view", TORCH_FN(view));
  m.impl("as_strided", TORCH_FN(as_strided));
  m.impl("_reshape_alias", TORCH_FN(reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("convolution_overrideable", TORCH_FN(convolution));
  m.impl("convolution_backward_overrideable", TORCH_FN(convolution_backward));
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(convolution, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(_convolution, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv_transpose2d, input, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
}

}  // namespace

// ---- what __init__.py calls ------------------------------------------------------------------------------------------------------

extern "C" {
void sim_setup() {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
}
int sim_count() { return DEVICES; }
int sim_current() { return current; }
void sim_set_current(int index) { current = index; }
int64_t sim_allocated(int d) { return devices[d].allocated; }
int64_t sim_reserved(int d) { return devices[d].reserved; }
int64_t sim_most_allocated(int d) { return devices[d].most_allocated; }
int64_t sim_most_reserved(int d) { return devices[d].most_reserved; }
int64_t sim_allocations(int d) { return devices[d].allocations; }
int64_t sim_total(int d) { return devices[d].total; }
int64_t sim_used(int d) { return devices[d].reserved + devices[d].context() + devices[d].others; }
void sim_forget_peak(int d) {
  devices[d].most_allocated = devices[d].allocated;
  devices[d].most_reserved = devices[d].reserved;
}
void sim_release() {
  std::lock_guard<std::recursive_mutex> held(lock);
  for (auto& device : devices) device.release();
}
void sim_limit(int d, int64_t bytes) { devices[d].limit = size_t(bytes); }
void sim_others(int d, int64_t bytes) { devices[d].others = size_t(bytes); }
int64_t sim_state(int d, void* bytes) {  // of the generator that is used where none is named; without bytes, how many there are
  auto state = at::Tensor(static_cast<c10::GeneratorImpl*>(default_generator(d).unsafeGetGeneratorImpl())->get_state());
  if (bytes) std::memcpy(bytes, state.const_data_ptr(), state.nbytes());
  return int64_t(state.nbytes());
}
void sim_set_state(int d, const void* bytes) {
  auto state = at::empty({sim_state(d, nullptr)}, at::kByte);
  std::memcpy(state.mutable_data_ptr(), bytes, state.nbytes());
  default_generator(d).unsafeGetGeneratorImpl()->set_state(*state.unsafeGetTensorImpl());
}
void sim_seed(int d, uint64_t seed) { default_generator(d).set_current_seed(seed); }
void sim_fail(int d, int64_t after) { devices[d].fails = after; }
}
