#include "backend.h"

#include "computer.h"

#include "ggml-backend-impl.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ggml.h"

#include <algorithm>
#include <cstring>
#include <map>

namespace hypura {

// --------------------------------------------------------------------------------------------- delegates

namespace {

class CpuDelegate final : public DelegateFactory {
public:
    // The device is looked up once: ggml's registry has no lock, and asking it during a pass would race with the load of
    // another model.
    explicit CpuDelegate(ggml_threadpool * threads)
        : threads_(threads), device_(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)) {}
    ggml_backend_t create() override {
        ggml_backend_t backend = ggml_backend_cpu_init();
        ggml_backend_cpu_set_threadpool(backend, threads_);
        return backend;
    }
    ggml_backend_buffer_type_t pool_buffer_type() override { return ggml_backend_cpu_buffer_type(); }
    ggml_backend_buffer_type_t activation_buffer_type() override { return ggml_backend_cpu_buffer_type(); }
    ggml_backend_dev_t device() override { return device_; }
    void set_threads(ggml_backend_t backend, int thread_count) override {
        ggml_backend_cpu_set_n_threads(backend, thread_count);
    }
    bool takes_any_distance() const override { return true; } // its kernels step by nb[2]

private:
    ggml_threadpool * const threads_;
    const ggml_backend_dev_t device_;
};

} // namespace

std::unique_ptr<DelegateFactory> make_cpu_delegate(ggml_threadpool * threads) {
    return std::make_unique<CpuDelegate>(threads);
}

int32_t uses_in_graph(const ggml_cgraph * split, int node_index) {
    return split->visited_hash_set.size == 0 ? -1 : ggml_node_get_use_count(split, node_index);
}

// ------------------------------------------------------------------------------------------------ the device

namespace {

std::string escaped(const std::string & text) {
    std::string out;
    for (const char c : text) {
        if (strchr(".^$|()[]{}*+?\\", c) != nullptr) {
            out.push_back('\\');
        }
        out.push_back(c);
    }
    return out;
}

// llama.cpp compiles each expression anew for each tensor, so few expressions matter: names that differ in their first
// number only share one.
std::vector<std::string> patterns_for(const std::vector<StreamedTensor> & tensors) {
    std::map<std::pair<std::string, std::string>, std::string> numbers; // (before, after) -> "1|2|3"
    std::vector<std::string> patterns;
    for (const StreamedTensor & t : tensors) {
        const size_t first = t.name.find_first_of("0123456789");
        const size_t last = std::min(t.name.find_first_not_of("0123456789", first), t.name.size());
        if (first == std::string::npos) {
            patterns.push_back("^" + escaped(t.name) + "$");
            continue;
        }
        std::string & list = numbers[{t.name.substr(0, first), t.name.substr(last)}];
        list += (list.empty() ? "" : "|") + t.name.substr(first, last - first);
    }
    for (const auto & [around, list] : numbers) {
        patterns.push_back("^" + escaped(around.first) + "(" + list + ")" + escaped(around.second) + "$");
    }
    return patterns;
}

} // namespace

bool StreamState::open(std::string * sentence) {
    if (!source.open(spec.stream.files, spec.stream.reader.direct, sentence)) {
        return false;
    }
    pool_is_host = ggml_backend_buft_is_host(delegate.pool_buffer_type());
    uint64_t bytes = 0;
    for (const ClassSpec & c : spec.stream.classes) {
        bytes += c.slot_bytes * c.slot_count;
    }
    const bool got = pool_is_host
                         ? host_pool.open(spec.stream.classes, {spec.huge_pages ? platform::PageKind::kHuge : platform::PageKind::kBase,
                                                                spec.touch_threads})
                         : delegate_pool.open(spec.stream.classes, delegate.pool_buffer_type());
    if (!got) {
        *sentence = "the pool for streamed weights needs " + std::to_string(bytes) +
                    " bytes, which the system does not give: lower --memory or close programs";
        return false;
    }
    if (pool_is_host) {
        host_buffer.reset(ggml_backend_cpu_buffer_from_ptr(host_pool.host(0), host_pool.bytes()));
    }
    PoolMemory * pool = pool_is_host ? static_cast<PoolMemory *>(&host_pool) : &delegate_pool;
    if (spec.wrap_source) {
        wrapped_source = spec.wrap_source(source);
    }
    if (!stream.open(spec.stream, wrapped_source ? wrapped_source.get() : &source, pool, sentence)) {
        return false;
    }
    if (!spec.trace.path.empty()) {
        spec.trace.stride_count = static_cast<uint32_t>(spec.stream.strides.size());
        if (!trace.open(spec.trace, sentence)) {
            return false;
        }
        stream.trace_to(&trace);
    }
    if (!predictor.open(spec, sentence)) {
        return false;
    }
    weights = std::make_unique<Weight[]>(spec.tensors.size());
    for (uint32_t i = 0; i < spec.tensors.size(); ++i) {
        weights[i].spec = &spec.tensors[i];
        weights[i].order = i;
        by_name[spec.tensors[i].name] = i;
    }
    patterns = patterns_for(spec.tensors);
    return true;
}

// A product on a weight of ours, or what stands between two of them: claiming it keeps a block in one split. Whether
// it is claimed changes speed only.
bool StreamState::claims(const ggml_tensor * op) const {
    switch (op->op) {
        case GGML_OP_NONE:
            return owns(op);
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
            return owns(op->src[0]);
        case GGML_OP_GLU:
        case GGML_OP_ADD_ID:
        case GGML_OP_UNARY:
        case GGML_OP_CLAMP:
        case GGML_OP_SCALE:
        case GGML_OP_SQR:
        case GGML_OP_VIEW:
        case GGML_OP_RESHAPE:
            return fed_by_product(op, 8) && ggml_backend_dev_supports_op(delegate.device(), op);
        default:
            return false;
    }
}

bool StreamState::fed_by_product(const ggml_tensor * t, int depth) const {
    if (t == nullptr || depth == 0) {
        return false;
    }
    if (is_product(t)) {
        return owns(t->src[0]);
    }
    return fed_by_product(t->src[0], depth - 1) ||
           (t->op == GGML_OP_GLU && fed_by_product(t->src[1], depth - 1));
}

// What ggml knows the device by.
struct StreamDevice::Impl : StreamState {
    ggml_backend_reg reg{};
    ggml_backend_device device{};
    ggml_backend_buffer_type buft{};

    using StreamState::StreamState;
    void make_device();
};

namespace {

// --------------------------------------------------------------------------------------- ggml's tables of functions

StreamDevice::Impl & impl_of(ggml_backend_dev_t dev) {
    return *static_cast<StreamDevice::Impl *>(dev->context);
}

Computer & computer_of(ggml_backend_t backend) {
    return *static_cast<Computer *>(backend->context);
}

// ---- buffer: addresses that nothing may touch

struct Reservation {
    StreamDevice::Impl & device;
    platform::Memory memory;
};

void buffer_free(ggml_backend_buffer_t buffer) {
    auto * r = static_cast<Reservation *>(buffer->context);
    platform::unmap_memory(&r->memory);
    delete r;
}

void * buffer_base(ggml_backend_buffer_t buffer) {
    return static_cast<Reservation *>(buffer->context)->memory.data;
}

// The loader asks ggml_nbytes how much to read: with no planes the answer is zero. init_backend gives the planes back.
ggml_status buffer_init_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor) {
    StreamDevice::Impl & device = static_cast<Reservation *>(buffer->context)->device;
    const auto found = device.by_name.find(tensor->name);
    if (found == device.by_name.end()) {
        device.set_error(std::string("llama.cpp put ") + tensor->name + " into the pool, which the plan does not stream");
        return GGML_STATUS_FAILED;
    }
    Weight & weight = device.weights[found->second];
    const uint32_t count = weight.spec->stride_count;
    const StreamPlan & plan = device.spec.stream;
    const uint64_t stride_bytes = plan.classes[plan.strides[weight.spec->first_stride].class_index].stride_bytes;
    const bool fits = count == 1 ? ggml_nbytes(tensor) == stride_bytes
                                 : tensor->ne[2] == count && tensor->nb[2] == stride_bytes && tensor->ne[3] == 1;
    if (!fits) {
        device.set_error(std::string("the plan and llama.cpp disagree on the size of ") + tensor->name);
        return GGML_STATUS_FAILED;
    }
    weight.tensor = tensor;
    tensor->extra = &weight;
    tensor->ne[3] = 0;
    return GGML_STATUS_SUCCESS;
}

// The loader writes no byte (ggml_nbytes is zero while it loads), and an op that is not ours has no business with the
// weight: the scheduler would copy it for another backend. Either is a fault and never a wrong number.
void buffer_set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void *, size_t, size_t size) {
    if (size > 0) {
        GGML_ABORT("%s is streamed, and %zu bytes were loaded into it", tensor->name, size);
    }
}

void buffer_get_tensor(ggml_backend_buffer_t, const ggml_tensor * tensor, void *, size_t, size_t) {
    GGML_ABORT("%s is streamed, and was read past the streamer", tensor->name);
}

void buffer_memset_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, uint8_t, size_t, size_t) {
    GGML_ABORT("%s is streamed, and was written to", tensor->name);
}

void buffer_clear(ggml_backend_buffer_t, uint8_t) {}

// ---- buffer type

const char * buft_name(ggml_backend_buffer_type_t) {
    return "Streamed";
}

ggml_backend_buffer_t buft_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    auto * r = new Reservation{impl_of(buft->device), platform::reserve_addresses(size)};
    if (r->memory.data == nullptr) {
        delete r;
        return nullptr;
    }
    ggml_backend_buffer_i iface{};
    iface.free_buffer = buffer_free;
    iface.get_base = buffer_base;
    iface.init_tensor = buffer_init_tensor;
    iface.memset_tensor = buffer_memset_tensor;
    iface.set_tensor = buffer_set_tensor;
    iface.get_tensor = buffer_get_tensor;
    iface.clear = buffer_clear;
    return ggml_backend_buffer_init(buft, iface, r, size);
}

size_t buft_alignment(ggml_backend_buffer_type_t) {
    return platform::kDirectAlign;
}

size_t buft_alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * tensor) {
    return std::max<size_t>(ggml_nbytes(tensor), platform::kDirectAlign);
}

bool buft_is_host(ggml_backend_buffer_type_t) {
    return false; // nobody may read through the address
}

// ---- backend

const char * backend_name(ggml_backend_t) {
    return "Streamed";
}

void backend_free(ggml_backend_t backend) {
    delete static_cast<Computer *>(backend->context);
    delete backend;
}

ggml_status backend_compute(ggml_backend_t backend, ggml_cgraph * cgraph) {
    return computer_of(backend).compute(cgraph);
}

void backend_set_threads(ggml_backend_t backend, int thread_count) {
    computer_of(backend).set_threads(thread_count);
}

// ---- device

const char * device_name(ggml_backend_dev_t) {
    return "Streamed";
}

const char * device_description(ggml_backend_dev_t) {
    return "weights streamed from the model file";
}

void device_memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    *free = *total = 0;
}

enum ggml_backend_dev_type device_type(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_ACCEL; // llama.cpp adds such a device to every context by itself
}

void device_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props = {};
    props->name = device_name(dev);
    props->description = device_description(dev);
    props->type = device_type(dev);
    props->caps.mmap_support = true; // or llama.cpp gives up mapping for the resident tensors
}

ggml_backend_t device_init_backend(ggml_backend_dev_t dev, const char *) {
    StreamDevice::Impl & device = impl_of(dev);
    for (Weight & weight : device.all_weights()) {
        if (weight.tensor != nullptr) {
            weight.tensor->ne[3] = 1; // loading is over; idempotent, there may be more contexts
        }
    }
    auto computer = std::make_unique<Computer>(device);
    if (!computer->ok()) {
        device.set_error("no memory for the scratch of streamed products");
        return nullptr;
    }
    static const ggml_guid guid = {0x68, 0x79, 0x70, 0x75, 0x72, 0x61, 0x2d, 0x73, 0x74, 0x72, 0x65, 0x61, 0x6d, 0x2d, 0x30, 0x31};
    auto * backend = new ggml_backend{};
    backend->guid = const_cast<ggml_guid *>(&guid);
    backend->iface.get_name = backend_name;
    backend->iface.free = backend_free;
    backend->iface.graph_compute = backend_compute;
    backend->device = dev;
    backend->context = computer.release();
    return backend;
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t dev) {
    // The delegate's, never our own: this is where activations go, and llama.cpp takes it for a home of CPU weights.
    return impl_of(dev).delegate.activation_buffer_type();
}

bool device_supports_op(ggml_backend_dev_t dev, const ggml_tensor * op) {
    return impl_of(dev).claims(op);
}

bool device_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
    StreamDevice::Impl & device = impl_of(dev);
    return buft == &device.buft || ggml_backend_dev_supports_buft(device.delegate.device(), buft);
}

const char * reg_name(ggml_backend_reg_t) {
    return "Streamed";
}

size_t reg_device_count(ggml_backend_reg_t) {
    return 1;
}

ggml_backend_dev_t reg_device(ggml_backend_reg_t reg, size_t) {
    return &static_cast<StreamDevice::Impl *>(reg->context)->device;
}

void ignore_abort_callback(ggml_backend_t, ggml_abort_callback, void *) {
    // The server core takes an aborted pass for a full KV cache and retries it to death; a pass ends by FAILED only.
}

void * reg_proc_address(ggml_backend_reg_t, const char * name) {
    if (strcmp(name, "ggml_backend_set_n_threads") == 0) {
        return reinterpret_cast<void *>(backend_set_threads);
    }
    if (strcmp(name, "ggml_backend_set_abort_callback") == 0) {
        return reinterpret_cast<void *>(ignore_abort_callback);
    }
    return nullptr;
}

} // namespace

void StreamDevice::Impl::make_device() {
    reg.api_version = GGML_BACKEND_API_VERSION;
    reg.iface = {reg_name, reg_device_count, reg_device, reg_proc_address};
    reg.context = this;
    device.iface.get_name = device_name;
    device.iface.get_description = device_description;
    device.iface.get_memory = device_memory;
    device.iface.get_type = device_type;
    device.iface.get_props = device_props;
    device.iface.init_backend = device_init_backend;
    device.iface.get_buffer_type = device_buffer_type;
    device.iface.supports_op = device_supports_op;
    device.iface.supports_buft = device_supports_buft;
    device.reg = &reg;
    device.context = this;
    buft.iface.get_name = buft_name;
    buft.iface.alloc_buffer = buft_alloc;
    buft.iface.get_alignment = buft_alignment;
    buft.iface.get_alloc_size = buft_alloc_size;
    buft.iface.is_host = buft_is_host;
    buft.device = &device;
    own_type = &buft;
}

StreamDevice::StreamDevice(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

std::unique_ptr<StreamDevice> StreamDevice::open(StreamingSpec spec, DelegateFactory & delegate, std::string * error) {
    auto impl = std::make_unique<Impl>(std::move(spec), delegate);
    if (!impl->open(error)) {
        return nullptr;
    }
    impl->make_device();
    ggml_backend_register(&impl->reg);
    return std::unique_ptr<StreamDevice>(new StreamDevice(std::move(impl)));
}

StreamDevice::~StreamDevice() {
    impl_->stream.close();
    impl_->trace.close();
}

void StreamDevice::hide() {
    ggml_backend_unload(&impl_->reg);
}

const std::vector<std::string> & StreamDevice::name_patterns() const {
    return impl_->patterns;
}

ggml_backend_buffer_type_t StreamDevice::buffer_type() {
    return &impl_->buft;
}

void StreamDevice::begin_serving() {
    impl_->probing = false;
    if (impl_->pool_is_host) {
        impl_->host_pool.make_present();
    }
}

Stream & StreamDevice::stream() {
    return impl_->stream;
}

uint64_t StreamDevice::pool_bytes() const {
    return impl_->pool_is_host ? impl_->host_pool.bytes() : impl_->delegate_pool.bytes();
}

BackendCounters StreamDevice::counters() const {
    return {impl_->pass_count, impl_->op_count, impl_->delegate_calls, impl_->wave_count, impl_->gathered_count,
            impl_->predictor.predicted_count(), impl_->predictor.right_count()};
}

std::vector<WeightCounters> StreamDevice::weight_counters() const {
    std::vector<WeightCounters> counters;
    for (const Weight & weight : impl_->all_weights()) {
        counters.push_back({weight.asked_count, weight.late_count, weight.stall_ns});
    }
    return counters;
}

void StreamDevice::interrupt(bool on) {
    impl_->stream.interrupt(on);
}

std::string StreamDevice::last_error() {
    std::lock_guard<std::mutex> lock(impl_->error_mutex);
    return impl_->error;
}

} // namespace hypura
