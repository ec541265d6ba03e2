// Kernel maps from the inputs' side, for strided convolutions: see scatter.cpp.
#pragma once

#include <cstdint>

#include "voxel_bitmap.h"

namespace fquant {

// False, with nothing of the table promised, where grid or outputs do not suit the method.
template <class T>
bool scatter_neighbors(const T* coords, int64_t inputs, const Range& in_range, const T* out_coords,
                       int64_t outputs, const Range& out_range, const Geometry& g, int32_t* table,
                       int64_t threads);

}  // namespace fquant
