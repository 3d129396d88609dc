// What the checks of all steps share. Every function throws std::invalid_argument.
#pragma once

#include <cstdint>
#include <string>

#include "engine/steps.h"

namespace sparsemtl::engine {

using Wide = __int128;  // sizes multiply without overflow

struct Slots {
  const int64_t* sizes;
  int64_t count;
};

[[noreturn]] void refuse(const std::string& what);
void require(bool good, const char* what);

// Floats [low, high) from the view's pixel (0, 0, 0, 0) on lie in its slot.
void check_span(const View& v, const Slots& slots, Wide low, Wide high);
void check_view(const View& v, const Slots& slots);
// What is written must not fold onto itself: threads would race.
void check_output(const View& v, const Slots& slots);
void check_act(int act);
void check_residual(const View& residual, const View& y, const Slots& slots);

Wide last_plane(const View& v);
bool empty(const View& v);
bool same_shape(const View& a, const View& b);

void check_conv(const ConvStep& s, const Slots& slots);

}  // namespace sparsemtl::engine
