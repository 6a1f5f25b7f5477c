// A stand-in accelerator: PyTorch's device "standin", of which there are two.
//
// Its tensors lie in host memory, and every operator runs the CPU's kernel on them, so that results equal the CPU's bit
// for bit. What real accelerators refuse is refused: tensors of two devices in one operator, more bytes than the device
// has, and, on request, float64, which Apple's mps lacks. The bytes of each device are counted.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <array>
#include <mutex>
#include <unordered_set>
#include <utility>
#include <vector>

namespace at::autocast {  // of <ATen/autocast_mode.h>, which takes three seconds
TORCH_API at::ScalarType get_autocast_dtype(c10::DeviceType);
TORCH_API Tensor cached_cast(at::ScalarType, const Tensor&, c10::DeviceType);
}

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::Storage;
using c10::Stream;
using c10::SymInt;
using c10::SymIntArrayRef;

constexpr auto KIND = c10::DeviceType::PrivateUse1;
constexpr int COUNT = 2;

// ------------------------------------------------------------------------------------------------ state of the devices

struct Memory {
  size_t live = 0, peak = 0, total = size_t(1) << 40;
};
std::array<Memory, COUNT> memories;
std::mutex counting;  // autograd has a thread for each device
thread_local DeviceIndex current = 0;
bool has_float64 = true;

void count(DeviceIndex index, size_t bytes) {
  std::lock_guard<std::mutex> alone(counting);
  Memory& memory = memories[index];
  TORCH_CHECK_WITH(OutOfMemoryError, memory.live + bytes <= memory.total, "standin out of memory: tried to allocate ",
                   bytes, " bytes, ", memory.total - memory.live, " of ", memory.total, " are free");
  memory.live += bytes;
  memory.peak = std::max(memory.peak, memory.live);
}

// While it lives, allocations are on this device.
struct On {
  explicit On(std::optional<Device> device) : before(current) {
    if (device && device->has_index()) current = device->index();
  }
  ~On() { current = before; }
  DeviceIndex before;
};

// What a storage of the stand-in owns: bytes that are counted, in the memory of another storage or of its own.
struct Owned {
  Owned(DeviceIndex index, size_t bytes) : index(index), bytes(bytes) { count(index, bytes); }
  ~Owned() {
    {
      std::lock_guard<std::mutex> alone(counting);
      memories[index].live -= bytes;
    }
    if (memory != nullptr) c10::free_cpu(memory);
  }
  DeviceIndex index;
  size_t bytes;
  void* memory = nullptr;
  Storage other;
};
void release(void* owned) { delete static_cast<Owned*>(owned); }

struct Allocator final : c10::DeviceAllocator {  // as torch.accelerator asks
  at::DataPtr allocate(size_t bytes) override {
    auto* owned = new Owned(current, bytes);
    owned->memory = c10::alloc_cpu(bytes);
    return {owned->memory, owned, &release, Device(KIND, current)};
  }
  at::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const at::DataPtr&, Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex) override { return {}; }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex) override {}
};
Allocator allocator;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  Device exchangeDevice(Device to) const override { return Device(KIND, std::exchange(current, to.index())); }
  Device getDevice() const override { return Device(KIND, current); }
  void setDevice(Device to) const override { current = to.index(); }
  void uncheckedSetDevice(Device to) const noexcept override { current = to.index(); }
  DeviceIndex deviceCount() const noexcept override { return COUNT; }
  Stream getStream(Device of) const override { return Stream(Stream::DEFAULT, of); }
  Stream getNewStream(Device of, int) const override { return Stream(Stream::DEFAULT, of); }
  Stream exchangeStream(Stream stream) const override { return Stream(Stream::DEFAULT, stream.device()); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};

struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(DeviceIndex index) : at::CPUGeneratorImpl(c10::default_rng_seed_val) {
    device_ = Device(KIND, std::max<DeviceIndex>(index, 0));
    key_set_ = DispatchKeySet(DispatchKey::PrivateUse1);
  }
};

void replace_memory(const Storage& storage, size_t bytes) {
  On device(storage.device());
  at::DataPtr memory = allocator.allocate(bytes);
  if (storage.nbytes() > 0) std::memcpy(memory.get(), storage.data(), std::min(bytes, storage.nbytes()));
  storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(memory));
  storage.unsafeGetStorageImpl()->set_nbytes(bytes);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  Device getDeviceFromPtr(void*) const override { return Device(KIND, current); }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  at::Generator getNewGenerator(DeviceIndex index) const override { return at::make_generator<Generator>(index); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    static at::Generator generator = at::make_generator<Generator>(0);
    return generator;
  }
  void resizePrivateUse1Bytes(const Storage& storage, size_t bytes) const override { replace_memory(storage, bytes); }
};

// ------------------------------------------------------------------------------- the same values on the CPU, and back

void check_dtype(at::ScalarType dtype) {
  TORCH_CHECK_TYPE(has_float64 || (dtype != at::kDouble && dtype != at::kComplexDouble), "standin has no float64");
}

bool is_here(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == KIND; }

Tensor shaped_as(const Tensor& like, Storage storage, DispatchKey key) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key), like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return tensor;
}

Tensor on_cpu(const Tensor& tensor) {
  Storage storage = tensor.storage();
  at::DataPtr shared(storage.mutable_data(), new Storage(storage),
                     [](void* kept) { delete static_cast<Storage*>(kept); }, c10::kCPU);
  auto implementation = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage.nbytes(), std::move(shared), c10::GetAllocator(c10::kCPU), true);
  Tensor result = shaped_as(tensor, Storage(implementation), DispatchKey::CPU);
  if (tensor.is_conj()) result._set_conj(true);
  if (tensor.is_neg()) result._set_neg(true);
  return result;
}

Tensor from_cpu(const Tensor& tensor, Device device) {
  check_dtype(tensor.scalar_type());
  Storage storage = tensor.storage();
  auto* owned = new Owned(device.index(), storage.nbytes());
  owned->other = storage;
  auto implementation = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage.nbytes(),
      at::DataPtr(storage.mutable_data(), owned, &release, device), &allocator, true);
  return shaped_as(tensor, Storage(implementation), DispatchKey::PrivateUse1);
}

// ------------------------------------------------------------------------------------------------- operators by the CPU

// Indices may be on the CPU, as on CUDA.
bool takes_indices(const std::string& name) {
  static const std::unordered_set<std::string> names{
      "aten::index.Tensor",  "aten::index.Tensor_out", "aten::index_put",
      "aten::index_put_",    "aten::_index_put_impl_", "aten::_unsafe_index.Tensor"};
  return names.count(name) > 0;
}

template <typename Function>
void for_each_tensor(const c10::IValue& value, Function function) {
  if (value.isTensor()) function(value.toTensor());
  if (value.isTensorList())
    for (const Tensor& tensor : value.toTensorVector()) function(tensor);
  if (value.isOptionalTensorList())
    for (const auto& tensor : value.toOptionalTensorVector())
      if (tensor) function(*tensor);
}

template <typename Function>
c10::IValue mapped(const c10::IValue& value, Function function) {
  if (value.isTensor()) return function(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> tensors;
    for (const Tensor& tensor : value.toTensorVector()) tensors.push_back(function(tensor));
    return tensors;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> tensors;
    for (const auto& tensor : value.toOptionalTensorVector())
      tensors.push_back(tensor ? std::optional<Tensor>(function(*tensor)) : tensor);
    return tensors;
  }
  return value;
}

void check_one_device(const std::string& name, c10::ArrayRef<c10::IValue> arguments, std::optional<Device>& device) {
  auto refuse = [&](const Tensor& tensor) {
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found ", device->str(), " and ",
                tensor.device().str(), " in ", name);
  };
  for (const auto& value : arguments)
    for_each_tensor(value, [&](const Tensor& tensor) {
      if (!is_here(tensor)) return;
      if (device && *device != tensor.device()) refuse(tensor);
      device = tensor.device();
    });
  if (!device || takes_indices(name)) return;
  for (const auto& value : arguments)
    for_each_tensor(value, [&](const Tensor& tensor) {
      if (tensor.defined() && !is_here(tensor) && tensor.dim() > 0) refuse(tensor);
    });
}

void run_on_cpu(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  const auto& schema = handle.schema();
  const auto name = c10::toString(schema.operator_name());
  const auto first = stack->size() - schema.arguments().size();
  std::optional<Device> device;
  check_one_device(name, c10::ArrayRef<c10::IValue>(*stack).slice(first), device);

  std::vector<std::pair<Tensor, Tensor>> pairs;   // of the stand-in, of the CPU
  std::optional<at::Generator> generator, twin;  // likewise
  for (auto i = first; i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isDevice() && value.toDevice().type() == KIND) {
      const Device asked = value.toDevice();
      device = asked.has_index() ? asked : Device(KIND, current);
      value = Device(c10::kCPU);
    } else if (value.isGenerator()) {
      generator = value.toGenerator();
      TORCH_CHECK(generator->device().type() == KIND, "Expected a 'standin' device type for generator but found '",
                  generator->device().type(), "' in ", name);
      twin = at::detail::createCPUGenerator();
      twin->set_state(generator->get_state());
      value = *twin;
    } else {
      value = mapped(value, [&](const Tensor& tensor) {
        if (!is_here(tensor)) return tensor;
        pairs.emplace_back(tensor, on_cpu(tensor));
        return pairs.back().second;
      });
    }
  }
  TORCH_CHECK(device, "no tensor of the stand-in in ", name);
  handle.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  if (generator) generator->set_state(twin->get_state());

  auto back = [&](const Tensor& tensor) -> Tensor {
    if (!tensor.defined()) return tensor;
    for (auto& [mine, theirs] : pairs) {
      if (tensor.is_same(theirs)) {  // changed in place, or an output that was passed in
        if (mine.storage().nbytes() < theirs.storage().nbytes())
          mine.set_(from_cpu(theirs, *device));
        else
          mine.unsafeGetTensorImpl()->set_sizes_and_strides(theirs.sizes(), theirs.strides(), theirs.storage_offset());
        return mine;
      }
      if (tensor.storage().is_alias_of(theirs.storage()))  // a view
        return shaped_as(tensor, mine.storage(), DispatchKey::PrivateUse1);
    }
    return from_cpu(tensor, *device);
  };
  for (auto i = stack->size() - schema.returns().size(); i < stack->size(); i++) (*stack)[i] = mapped((*stack)[i], back);
}

void run_in_lower_precision(const c10::OperatorHandle& handle, DispatchKeySet, torch::jit::Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard once(DispatchKey::AutocastPrivateUse1);
  const auto dtype = at::autocast::get_autocast_dtype(KIND);
  for (auto i = stack->size() - handle.schema().arguments().size(); i < stack->size(); i++)
    (*stack)[i] = mapped((*stack)[i], [&](const Tensor& tensor) {
      return is_here(tensor) ? at::autocast::cached_cast(dtype, tensor, KIND) : tensor;
    });
  handle.callBoxed(stack);
}

// ------------------------------------------------------------------------------------------- operators of the device's own

at::ScalarType checked_dtype(std::optional<at::ScalarType> dtype) {
  const auto chosen = dtype.value_or(at::typeMetaToScalarType(at::get_default_dtype()));
  check_dtype(chosen);
  return chosen;
}

Tensor empty(SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  On there(device);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator, DispatchKeySet(DispatchKey::PrivateUse1),
                                   checked_dtype(dtype), format);
}

Tensor empty_strided(SymIntArrayRef size, SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  On there(device);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
                                           DispatchKeySet(DispatchKey::PrivateUse1), checked_dtype(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  Tensor target = is_here(to) ? on_cpu(to) : to;
  target.copy_(is_here(from) ? on_cpu(from) : from);
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const Tensor& tensor) { return on_cpu(tensor).item(); }

const Tensor& resize(const Tensor& tensor, SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const size_t bytes = (tensor.storage_offset() + c10::multiply_integers(sizes)) * tensor.itemsize();
  if (tensor.storage().nbytes() < bytes) replace_memory(tensor.storage(), bytes);
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return tensor;
}

Tensor& set_storage(Tensor& tensor, Storage storage, SymInt offset, SymIntArrayRef size, SymIntArrayRef stride) {
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                                      offset.expect_int());
  return tensor;
}

Tensor& set_tensor(Tensor& tensor, const Tensor& source) {
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(source.storage());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(source.sizes(), source.strides(), source.storage_offset());
  return tensor;
}

Tensor& set_whole_storage(Tensor& tensor, Storage storage) {
  const int64_t numbers = storage.nbytes() / tensor.itemsize();
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous({numbers});
  return tensor;
}

Tensor view(const Tensor& tensor, SymIntArrayRef size) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor as_strided(const Tensor& tensor, SymIntArrayRef size, SymIntArrayRef stride, std::optional<SymInt> offset) {
  return at::native::as_strided_tensorimpl(tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt);
}

Tensor reshape_alias(const Tensor& tensor, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::_reshape_alias(tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor unfold(const Tensor& tensor, int64_t axis, int64_t size, int64_t step) {
  return at::native::unfold(tensor, axis, size, step);
}

// Assigning to `Tensor.data` moves a parameter to another device, as on CUDA.
bool has_compatible_type(const Tensor&, const Tensor&) { return true; }

// Of integers too, as on CUDA; the CPU has no kernel for these.
Tensor histc(const Tensor& tensor, int64_t bins, const at::Scalar& least, const at::Scalar& most) {
  const Tensor numbers = on_cpu(tensor);
  return from_cpu(numbers.to(at::kFloat).histc(bins, least, most).to(numbers.scalar_type()), tensor.device());
}

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);
}
namespace c10 {
REGISTER_ALLOCATOR(DeviceType::PrivateUse1, &allocator);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", item);
  library.impl("resize_", resize);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("set_.source_Storage", set_whole_storage);
  library.impl("view", view);
  library.impl("as_strided", as_strided);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("unfold", unfold);
  library.impl("_has_compatible_shallow_copy_type", has_compatible_type);
  library.impl("histc", histc);
  // A device without a kernel of its own gets a formula, which rounds otherwise.
  for (const char* name : {"native_layer_norm", "native_group_norm", "silu_backward", "mish_backward"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, library) {
  for (const char* name : {"linear", "matmul", "mm", "bmm", "addmm", "scaled_dot_product_attention"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_in_lower_precision>());
}

// For ctypes.
extern "C" {
void register_device() {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
}
void set_float64(bool has) { has_float64 = has; }
int get_current() { return current; }
void set_current(int index) { current = index; }
size_t live(int index) { return memories[index].live; }
size_t peak(int index) { return memories[index].peak; }
size_t total(int index) { return memories[index].total; }
void reset_peak(int index) { memories[index].peak = memories[index].live; }
void set_total(int index, size_t bytes) { memories[index].total = bytes; }
}
