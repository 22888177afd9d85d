// robustfast._C: importing it registers the ops; what it offers itself is introspection. Of Python's stable interface
// alone, so that one binary serves all versions.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "common/normal.h"
#include "cpu/isa.h"

#ifndef RF_CUDA_ARCHITECTURES
#define RF_CUDA_ARCHITECTURES ""
#endif
#if defined(__x86_64__)
#define RF_INSTRUCTION_SETS "baseline avx2 avx512"
#else
#define RF_INSTRUCTION_SETS "baseline"
#endif

namespace {

// A new list of the words of a text, or null with Python's error set.
PyObject* words_of(const char* text) {
  PyObject* const whole = PyUnicode_FromString(text);
  PyObject* const words = whole ? PyUnicode_Split(whole, nullptr, -1) : nullptr;
  Py_XDECREF(whole);
  return words;
}

PyObject* build_info(PyObject*, PyObject*) {
  const char* isa;
  try {
    isa = robustfast::name(robustfast::active_isa());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
  return Py_BuildValue("{s:s,s:s,s:N,s:N,s:s}", "compiler", "gcc-compatible " __VERSION__, "torch", RF_TORCH_VERSION,
                       "cuda_architectures", words_of(RF_CUDA_ARCHITECTURES), "instruction_sets",
                       words_of(RF_INSTRUCTION_SETS), "instruction_set", isa);
}

PyObject* philox4x32(PyObject*, PyObject* arguments) {
  unsigned counter[4], key[2];
  if (!PyArg_ParseTuple(arguments, "(IIII)(II)", &counter[0], &counter[1], &counter[2], &counter[3], &key[0], &key[1]))
    return nullptr;
  const auto words = robustfast::philox4x32({counter[0], counter[1], counter[2], counter[3]}, key[0], key[1]);
  return Py_BuildValue("[IIII]", words.w0, words.w1, words.w2, words.w3);
}

PyObject* box_muller(PyObject*, PyObject* arguments) {
  unsigned w0, w1;
  if (!PyArg_ParseTuple(arguments, "II", &w0, &w1)) return nullptr;
  const robustfast::Pair normals = robustfast::box_muller<robustfast::Polynomials>(w0, w1, 1);
  return Py_BuildValue("[ff]", normals.first, normals.second);
}

PyMethodDef functions[] = {
    {"build_info", build_info, METH_NOARGS,
     "What this binary was built with (compiler, torch, CUDA architectures, instruction sets) and the instruction set "
     "that runs."},
    {"philox4x32", philox4x32, METH_VARARGS, "philox4x32(counter, key): Philox4x32-10, four words of a counter."},
    {"box_muller", box_muller, METH_VARARGS, "box_muller(w0, w1): two normals of two words."},
    {},
};

PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_C",
    .m_doc = "Compiled ops of robustfast.",
    .m_size = -1,
    .m_methods = functions,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
