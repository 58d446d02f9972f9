// How a C++ function is called from Rust: no exception leaves it; what one says is returned, for torch_ext_free.

#pragma once

#include <c10/util/Exception.h>

#include <cstring>
#include <exception>

namespace {

template <typename Body> char *guarded(Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const c10::Error &error) {
    return strdup(error.what_without_backtrace());
  } catch (const std::exception &error) {
    return strdup(error.what());
  } catch (...) {
    return strdup("an exception of an unknown type");
  }
}

} // namespace
