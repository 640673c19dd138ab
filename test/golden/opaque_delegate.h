// A delegate whose memory is not the host's, as a GPU's is not: the CPU's kernels behind buffers whose addresses fault
// when touched. What computes through it cannot have taken a shortcut through a pointer, so it proves that a delegate
// with memory of its own needs no other path in backend.cpp.
#pragma once

#include "../../ffi/native/backend.h"

namespace hypura {

std::unique_ptr<DelegateFactory> make_opaque_delegate(ggml_threadpool * threads);

} // namespace hypura
