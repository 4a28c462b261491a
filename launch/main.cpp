#include <exception>
#include <new>
#include <string>
#include <system_error>
#include <vector>

#include "kernels/error.hpp"
#include "launch/commands.hpp"
#include "launch/failure.hpp"
#include "launch/guard.hpp"

int main(int argc, char** argv) {
  using namespace annulus;
  try {
    launch::guard_process();
    launch::run_program(std::vector<std::string>(argv + 1, argv + argc));
    return 0;
  } catch (const Error& error) {
    return launch::report_failure(error.code(), error.what());
  } catch (const std::bad_alloc& error) {
    return launch::report_failure(ExitCode::no_memory, error.what());
  } catch (const std::system_error& error) {
    return launch::report_failure(ExitCode::io, error.what());
  } catch (const std::exception& error) {
    return launch::report_failure(ExitCode::internal, error.what());
  }
}
