// A stream over a FakeSource with strides laid end to end, for the stream's tests.
#pragma once

#include "fake_source.h"
#include "stream.h"

#include <memory>
#include <string>

struct StreamRig {
    hypura::StreamPlan plan;
    std::unique_ptr<FakeSource> source;
    std::unique_ptr<hypura::HostPool> host;
    std::unique_ptr<FakeDevicePool> device;
    hypura::Stream stream;

    // Appends strides of a new class; they follow each other in file 0 from an odd offset.
    void add_class(uint32_t stride_count, const hypura::ClassSpec& spec) {
        uint32_t class_index = static_cast<uint32_t>(plan.classes.size());
        plan.classes.push_back(spec);
        plan.classes.back().slot_bytes = hypura::min_slot_bytes(spec.stride_bytes);
        if (plan.files.empty()) {
            plan.files.push_back({"fake.gguf", 96});
        }
        for (uint32_t i = 0; i < stride_count; i++) {
            plan.strides.push_back({class_index, i, static_cast<uint32_t>(plan.extents.size()), 1});
            plan.extents.push_back({0, plan.files[0].bytes, spec.stride_bytes});
            plan.files[0].bytes += spec.stride_bytes;
        }
    }
    bool open(std::string* error) {
        std::vector<uint64_t> bytes;
        for (const hypura::FileSpec& file : plan.files) {
            bytes.push_back(file.bytes);
        }
        source = std::make_unique<FakeSource>(bytes);
        host = std::make_unique<hypura::HostPool>();
        CHECK(host->open(plan.classes, {hypura::platform::PageKind::kBase, 1}));
        host->make_present(); // meanwhile
        return stream.open(plan, source.get(), host.get(), error);
    }
    void must_open() {
        std::string error;
        bool opened = open(&error);
        if (!opened) {
            std::fprintf(stderr, "%s\n", error.c_str());
        }
        CHECK(opened);
    }
    std::vector<hypura::Extent> extents(uint32_t stride_index) const {
        const hypura::StrideSpec& s = plan.strides[stride_index];
        auto first = plan.extents.begin() + s.first_extent;
        return {first, first + s.extent_count};
    }
    const std::byte* data(const hypura::Lease& lease) {
        return device ? device->at({lease.class_index, lease.slot_index}) + lease.phase_bytes : lease.data;
    }
    void verify(const hypura::Lease& lease) {
        CHECK(lease.state == hypura::LeaseState::kReady);
        CHECK(has_pattern(extents(lease.stride_index), data(lease)));
    }
    // One op on these strides, in waves if it must; false when a read failed or the stream was interrupted.
    hypura::Status op(const std::vector<uint32_t>& strides) {
        std::vector<hypura::Lease> left(strides.size());
        for (size_t i = 0; i < strides.size(); i++) {
            left[i].stride_index = strides[i];
        }
        while (!left.empty()) {
            hypura::Span<hypura::Lease> span{left.data(), static_cast<uint32_t>(left.size())};
            hypura::BeginResult begun = stream.begin(span, hypura::Holding::kNothing);
            if (begun.status != hypura::Status::kOk) {
                return begun.status;
            }
            CHECK(begun.admitted_count > 0);
            std::vector<hypura::Lease> rest;
            hypura::Status status = hypura::Status::kOk;
            bool reading = true;
            while (status == hypura::Status::kOk && reading) {
                status = stream.wait_some(span);
                reading = false;
                for (const hypura::Lease& lease : left) {
                    reading |= lease.state == hypura::LeaseState::kReading;
                }
            }
            for (const hypura::Lease& lease : left) {
                if (lease.state == hypura::LeaseState::kReady) {
                    verify(lease);
                } else if (lease.state == hypura::LeaseState::kWaiting) {
                    rest.push_back(lease);
                }
            }
            stream.release(span);
            if (status != hypura::Status::kOk) {
                return status;
            }
            left = rest;
        }
        return hypura::Status::kOk;
    }
};
