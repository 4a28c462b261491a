#pragma once

#include <string>
#include <string_view>

namespace annulus {

/// Throws cannot_create, "what: cannot write path: why", unless a file could be written at `path`;
/// touches nothing. For what is written when a long computation is done.
void require_writable_text(std::string_view what, const std::string& path);

/// Writes `text` at `path`, over what was there; throws cannot_create.
void write_text(std::string_view what, const std::string& path, std::string_view text);

}  // namespace annulus
