#include "opaque_delegate.h"

#include "ggml-backend-impl.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"

#include <cstdlib>
#include <cstring>
#include <deque>

namespace hypura {

namespace {

// Addresses that fault, and the memory that they stand for.
struct Opaque {
    platform::Memory addresses;
    char * bytes = nullptr;

    char * real(const void * address) const {
        return bytes + (static_cast<const char *>(address) - reinterpret_cast<const char *>(addresses.data));
    }
};

extern ggml_backend_buffer_type opaque_type;

bool is_opaque(const ggml_backend_buffer_t buffer) {
    return buffer != nullptr && buffer->buft == &opaque_type;
}

Opaque & opaque_of(ggml_backend_buffer_t buffer) {
    return *static_cast<Opaque *>(buffer->context);
}

ggml_backend_buffer_t home_of(const ggml_tensor * t) {
    return t->view_src != nullptr ? t->view_src->buffer : t->buffer;
}

ggml_backend_buffer_t alloc(ggml_backend_buffer_type_t buft, size_t size) {
    auto * o = new Opaque;
    o->addresses = platform::reserve_addresses(size + platform::kDirectAlign);
    o->bytes = static_cast<char *>(aligned_alloc(platform::kDirectAlign, (size / platform::kDirectAlign + 1) * platform::kDirectAlign));
    ggml_backend_buffer_i iface{};
    iface.free_buffer = [](ggml_backend_buffer_t buffer) {
        Opaque & self = opaque_of(buffer);
        platform::unmap_memory(&self.addresses);
        free(self.bytes);
        delete &self;
    };
    iface.get_base = [](ggml_backend_buffer_t buffer) -> void * { return opaque_of(buffer).addresses.data; };
    iface.memset_tensor = [](ggml_backend_buffer_t buffer, ggml_tensor * t, uint8_t value, size_t offset, size_t n) {
        memset(opaque_of(buffer).real(t->data) + offset, value, n);
    };
    iface.set_tensor = [](ggml_backend_buffer_t buffer, ggml_tensor * t, const void * data, size_t offset, size_t n) {
        memcpy(opaque_of(buffer).real(t->data) + offset, data, n);
    };
    iface.get_tensor = [](ggml_backend_buffer_t buffer, const ggml_tensor * t, void * data, size_t offset, size_t n) {
        memcpy(data, opaque_of(buffer).real(t->data) + offset, n);
    };
    iface.clear = [](ggml_backend_buffer_t buffer, uint8_t value) {
        memset(opaque_of(buffer).bytes, value, buffer->size);
    };
    return ggml_backend_buffer_init(buft, iface, o, size);
}

ggml_backend_device opaque_device;

ggml_backend_buffer_type make_type() {
    ggml_backend_buffer_type type{};
    type.iface.get_name = [](ggml_backend_buffer_type_t) { return "Opaque"; };
    type.iface.alloc_buffer = alloc;
    type.iface.get_alignment = [](ggml_backend_buffer_type_t) -> size_t { return 64; };
    type.iface.is_host = [](ggml_backend_buffer_type_t) { return false; };
    type.device = &opaque_device;
    return type;
}

ggml_backend_buffer_type opaque_type = make_type();

ggml_backend_dev_t cpu() {
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

// The CPU's backend; before it computes, every opaque address of the graph is translated in copies of the tensors.
struct OpaqueBackend {
    ggml_backend_ptr cpu;
};

ggml_status compute(ggml_backend_t backend, ggml_cgraph * cgraph) {
    std::deque<ggml_tensor> copies;
    const auto translated = [&](const ggml_tensor * t) {
        copies.push_back(*t);
        ggml_tensor & copy = copies.back();
        if (is_opaque(home_of(t))) {
            copy.data = opaque_of(home_of(t)).real(t->data);
        }
        return &copy;
    };
    const int count = ggml_graph_n_nodes(cgraph);
    ggml_init_params params{};
    params.mem_size = ggml_graph_overhead_custom(static_cast<size_t>(count) + 1, false) + ggml_tensor_overhead();
    params.no_alloc = true;
    const ggml_context_ptr context(ggml_init(params));
    ggml_cgraph * graph = ggml_new_graph_custom(context.get(), static_cast<size_t>(count) + 1, false);
    for (int i = 0; i < count; ++i) {
        ggml_tensor * node = translated(ggml_graph_node(cgraph, i));
        for (ggml_tensor *& source : node->src) {
            source = source == nullptr ? nullptr : translated(source);
        }
        ggml_graph_add_node(graph, node);
    }
    return ggml_backend_graph_compute(static_cast<OpaqueBackend *>(backend->context)->cpu.get(), graph);
}

class OpaqueDelegate final : public DelegateFactory {
public:
    explicit OpaqueDelegate(ggml_threadpool * threads) : threads_(threads) {
        opaque_device.iface.get_name = [](ggml_backend_dev_t) { return "Opaque"; };
        opaque_device.iface.supports_op = [](ggml_backend_dev_t, const ggml_tensor * op) {
            return ggml_backend_dev_supports_op(cpu(), op);
        };
        opaque_device.iface.supports_buft = [](ggml_backend_dev_t, ggml_backend_buffer_type_t buft) {
            return buft == &opaque_type;
        };
    }
    ggml_backend_t create() override {
        auto * own = new OpaqueBackend;
        own->cpu.reset(ggml_backend_cpu_init());
        ggml_backend_cpu_set_threadpool(own->cpu.get(), threads_);
        auto * backend = new ggml_backend{};
        backend->iface.get_name = [](ggml_backend_t) { return "Opaque"; };
        backend->iface.free = [](ggml_backend_t b) {
            delete static_cast<OpaqueBackend *>(b->context);
            delete b;
        };
        backend->iface.graph_compute = compute;
        backend->device = &opaque_device;
        backend->context = own;
        return backend;
    }
    ggml_backend_buffer_type_t pool_buffer_type() override { return &opaque_type; }
    ggml_backend_buffer_type_t activation_buffer_type() override { return &opaque_type; }
    ggml_backend_dev_t device() override { return &opaque_device; }
    void set_threads(ggml_backend_t backend, int thread_count) override {
        ggml_backend_cpu_set_n_threads(static_cast<OpaqueBackend *>(backend->context)->cpu.get(), thread_count);
    }

private:
    ggml_threadpool * const threads_;
};

} // namespace

std::unique_ptr<DelegateFactory> make_opaque_delegate(ggml_threadpool * threads) {
    return std::make_unique<OpaqueDelegate>(threads);
}

} // namespace hypura
