// Python's view of the engine, for tests only: options, reports, counters, device memory, PTX modules from text.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "engine/machine.h"
#include "engine/module.h"

namespace py = pybind11;
using ptxvm::Engine;

namespace {

std::vector<uint8_t> pack(const ptxvm::Program& program, const py::sequence& arguments) {
  if (py::len(arguments) != program.params.size())
    throw py::value_error("the kernel takes " + std::to_string(program.params.size()) + " arguments");
  std::vector<uint8_t> params(program.param_bytes);
  for (size_t i = 0; i < program.params.size(); ++i) {
    const ptxvm::Program::Param& param = program.params[i];
    if (py::isinstance<py::bytes>(arguments[i])) {
      const std::string bytes = arguments[i].cast<std::string>();
      if (bytes.size() != param.size) throw py::value_error("argument " + std::to_string(i) + " has another size");
      std::memcpy(params.data() + param.offset, bytes.data(), bytes.size());
    } else {
      const uint64_t value = py::int_(arguments[i]).attr("__and__")(py::int_(UINT64_MAX)).cast<uint64_t>();
      std::memcpy(params.data() + param.offset, &value, param.size < 8 ? param.size : 8);
    }
  }
  return params;
}

std::string launch(ptxvm::Module& module, const std::string& name, std::array<uint32_t, 3> grid,
                   std::array<uint32_t, 3> block, const py::sequence& arguments, uint32_t shared) {
  const ptxvm::Program* program = module.kernel(name);
  if (program == nullptr) throw py::value_error("no kernel " + name);
  std::vector<uint8_t> params = pack(*program, arguments);
  return ptxvm::run_launch(Engine::get(), module, *program, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},
                           std::move(params), shared);
}

void set_options(const py::kwargs& options) {
  ptxvm::Options& now = Engine::get().options;
  for (const auto& option : options) {
    const std::string name = option.first.cast<std::string>();
    if (name == "seed") {
      now.seed = option.second.cast<uint64_t>();
      Engine::get().num_launches = 0;  // the same launches get the same schedules again
    } else if (name == "counts") {
      now.counts = option.second.cast<bool>();
    } else if (name == "most_blocks") {
      now.most_blocks = option.second.cast<uint32_t>();
    } else if (name == "few") {
      now.few = option.second.cast<std::string>();
    } else if (name == "failing_call") {
      now.failing_call = option.second.cast<uint64_t>();
      Engine::get().runtime_calls = 0;
    } else if (name == "num_failing_calls") {
      now.num_failing_calls = option.second.cast<uint64_t>();
    } else if (name == "failing_code") {
      now.failing_code = option.second.cast<int>();
    } else if (name == "num_sms") {
      now.num_sms = option.second.cast<int>();
    } else if (name == "capability") {
      now.capability = option.second.cast<int>();
    } else if (name == "most_instructions") {
      now.most_instructions = option.second.cast<uint64_t>();
    } else {
      throw py::value_error("no option " + name);
    }
  }
}

}  // namespace

PYBIND11_MODULE(ptxvm, m) {
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const ptxvm::DecodeError& decode) {
      PyErr_SetString(PyExc_ValueError, decode.text.c_str());
    }
  });
  py::class_<ptxvm::Module>(m, "Module")
      .def(py::init<std::string>(), py::arg("ptx"))
      .def("kernels", &ptxvm::Module::kernel_names)
      .def("launch", &launch, py::arg("name"), py::arg("grid"), py::arg("block"), py::arg("arguments"),
           py::arg("shared") = 0)
      .def("texts", [](ptxvm::Module& module, const std::string& name) { return module.kernel(name)->texts; });
  m.def("set_options", &set_options);
  m.def("reports", [] { return Engine::get().reports; });
  m.def("clear_reports", [] { Engine::get().reports.clear(); });
  m.def("counters", [] { return Engine::get().counters.as_map(); });
  m.def("clear_counters", [] { Engine::get().counters = {}; });
  m.def("launches", [] { return Engine::get().launches_of; });
  m.def("instructions", [] { return Engine::get().instructions; });
  m.def("runtime_calls", [] { return Engine::get().runtime_calls; });
  m.def("known_kernels", [] { return Engine::get().known_kernels; });
  m.def("places", [](const std::string& kind) { return Engine::get().mutants.places(Engine::get(), kind); });
  m.def("executed", [](const std::string& kind) { return Engine::get().mutants.executed(Engine::get(), kind); });
  m.def("forget_executed", [] { Engine::get().mutants.forget(Engine::get()); });
  m.def("mutate", [](const std::string& kind, const std::string& place) {
    Engine::get().mutants.mutate(Engine::get(), kind, place);
  });
  m.def("readable", &ptxvm::readable);
  m.def("num_regions", [] { return Engine::get().memory.size(); });
  m.def(
      "add_memory",
      [](uintptr_t address, uint64_t bytes, bool writable, bool defined, const std::string& name) {
        Engine::get().memory.add(reinterpret_cast<void*>(address), bytes, writable, defined, name);
      },
      py::arg("address"), py::arg("bytes"), py::arg("writable") = true, py::arg("defined") = true,
      py::arg("name") = "memory");
  m.def("remove_memory", [](uintptr_t address, uint64_t bytes) {
    Engine::get().memory.remove(reinterpret_cast<void*>(address), bytes);
  });
}
