// The type that kernels compute in: float, or double for double.
#pragma once

namespace the_mask {

template <class T>
struct WorkOf {
  typedef float type;
};
template <>
struct WorkOf<double> {
  typedef double type;
};
template <class T>
using Work = typename WorkOf<T>::type;

}  // namespace the_mask
