// The layer's usual call on the CPU as an autograd function in C++: native.py without Python.
//
// On small maps starting a call takes longer than computing it. `run` returns None for whatever is
// not usual, wrong shapes too, and changes nothing then: kernels/__init__.py goes on. Built when the
// package is installed where PyTorch can be imported (setup.py), for that version of it.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/custom_class.h>

#include <cstring>
#include <string>

extern "C" {
#include "native.h"
}

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What `setup` was given: the functions of native.c, and native.py's `formula`.
enum Kind { F32, F64, BF16, KINDS };
int (*forward_of[KINDS])(const Forward*);
int (*backward_of[KINDS])(const Backward*);
int64_t (*saved_of)(const Layer*);
int64_t (*state_of)(const Layer*);
bool parallel;
PyObject* formula;

// What the backward pass is told, apart from tensors.
struct Head {
  Layer layer;
  int64_t relu, residual_needed;
  int64_t x_needed;  /* of a synchronised layer */
  double values;     /* of a channel in all processes, if the layer is synchronised; else 0 */
};

// As letters, two a byte: compiled autograd makes a Python string of it.
std::string as_text(const Head& head) {
  auto* bytes = reinterpret_cast<const unsigned char*>(&head);
  std::string text(2 * sizeof(Head), 'a');
  for (size_t i = 0; i < sizeof(Head); i++) {
    text[2 * i] += bytes[i] >> 4;
    text[2 * i + 1] += bytes[i] & 15;
  }
  return text;
}

Head from_text(const std::string& text) {
  Head head;
  auto* bytes = reinterpret_cast<unsigned char*>(&head);
  for (size_t i = 0; i < sizeof(Head); i++)
    bytes[i] = (text[2 * i] - 'a') << 4 | (text[2 * i + 1] - 'a');
  return head;
}

struct WithoutGil {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

// Sums a vector over processes, in its place: a Python function.
struct Reduce : torch::CustomClassHolder {
  PyObject* function;
  explicit Reduce(PyObject* callable) : function(callable) { Py_INCREF(function); }
  ~Reduce() override {
    pybind11::gil_scoped_acquire gil;
    Py_DECREF(function);
  }
  void operator()(const Tensor& sums) const {
    pybind11::gil_scoped_acquire gil;
    THPObjectPtr wrapped(THPVariable_Wrap(sums));
    THPObjectPtr done(PyObject_CallFunctionObjArgs(function, wrapped.get(), nullptr));
    if (done) return;
    python_error error;
    error.persist();
    throw error;
  }
};

int kind_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return F32;
    case at::kDouble: return F64;
    case at::kBFloat16: return BF16;
    default: return KINDS;
  }
}

// Dense on the CPU and nothing else: no transform's wrapper, not negated lazily, no zero tensor.
bool is_plain(const Tensor& t) {
  static const auto usual =
      c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                           c10::DispatchKey::AutocastCPU, c10::DispatchKey::ADInplaceOrView});
  return (t.key_set() | usual) == usual;
}

bool is_vector(const Tensor& t, int64_t size, at::ScalarType dtype) {
  return t.dim() == 1 && t.size(0) == size && t.scalar_type() == dtype && is_plain(t) &&
         t.is_contiguous();
}

at::MemoryFormat format_of(const Tensor& x, bool last) {
  if (!last) return at::MemoryFormat::Contiguous;
  return x.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
}

void* address(const Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }
void* address(const Maybe& t) { return t ? t->data_ptr() : nullptr; }

struct Call {
  Head head;
  at::MemoryFormat format;
  double momentum;
  Maybe counter;
  c10::intrusive_ptr<Reduce> reduce;  // null if there is one process
};

// Mean and variance (2, C) of this process's `values` to those of all; returns the number of theirs.
// In double, cancellation costs nothing visible.
double join(double* moments, int64_t channels, double values, const Reduce& reduce) {
  Tensor sums = at::empty({2 * channels + 1}, at::kDouble);
  double *sum = sums.data_ptr<double>(), *square = sum + channels, *var = moments + channels;
  for (int64_t c = 0; c < channels; c++) {
    sum[c] = moments[c] * values;
    square[c] = (var[c] + moments[c] * moments[c]) * values;
  }
  sum[2 * channels] = values;
  reduce(sums);
  double count = sum[2 * channels];
  for (int64_t c = 0; c < channels; c++) {
    double mean = sum[c] / count, spread = square[c] / count - mean * mean;
    moments[c] = mean;
    var[c] = spread < 0 ? 0 : spread;  // NaN stays
  }
  return count;
}

// Gradient of x, and those of the four `parameters` in their place. Hooks may have changed what was
// saved: its layout is mended, more is an error.
Tensor gradients(const Head& head, Tensor dy, Tensor x, Tensor y, Tensor saved,
                 Tensor (&parameters)[4], bool needed, Tensor* d_residual,
                 const Reduce* reduce) {
  const Layer* layer = &head.layer;
  TORCH_CHECK(x.scalar_type() == dy.scalar_type() && x.sizes() == dy.sizes() &&
                  saved.scalar_type() == at::kDouble && saved.numel() == saved_of(layer) &&
                  is_plain(x) && is_plain(saved) && (!y.defined() || y.sizes() == x.sizes()),
              "what the layer saved came back with another dtype, shape or device: ",
              x.toString(), x.sizes(), " and ", saved.toString(), saved.sizes());
  // Instances of one value have one layout: there the library is told that channels are last.
  auto format = format_of(x, layer->last && layer->length > 1);
  auto dtype = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  bool both = head.relu && head.residual_needed;  // one pass writes both
  Tensor dx, state, found[4];
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    x = x.contiguous(format);
    dy = dy.contiguous(format);
    saved = saved.contiguous();
    if (y.defined()) y = y.to(x.scalar_type()).contiguous(format);
    if (needed || both) dx = at::empty_like(x);
    if (head.residual_needed) *d_residual = head.relu ? at::empty_like(x) : dy;
    for (int i = 0; i < 4; i++)
      if (parameters[i].defined()) {
        parameters[i] = parameters[i].to(dtype).contiguous();
        found[i] = at::empty_like(parameters[i]);
      }
    if (reduce) state = at::empty({state_of(layer)}, at::kDouble);
  }
  Backward given = {layer, at::get_num_threads(), head.relu, dy.data_ptr(), x.data_ptr(),
                    address(y), address(dx), both ? address(*d_residual) : nullptr,
                    saved.data_ptr<double>(), address(parameters[2]), address(parameters[3]),
                    address(found[0]), address(found[1]), address(found[2]), address(found[3])};
  if (reduce) {
    given.part = SUMS;
    given.state = state.data_ptr<double>();
    given.values = head.values;
  }
  int failed = backward_of[kind_of(x)](&given);
  if (reduce && !failed) {
    if (head.x_needed) (*reduce)(state.narrow(0, 0, 2 * layer->channels));
    given.part = REST;
    if (dx.defined()) failed = backward_of[kind_of(x)](&given);
  }
  TORCH_CHECK_WITH(OutOfMemoryError, !failed,
                   "no memory for the gradients of an input of shape ", x.sizes());
  for (int i = 0; i < 4; i++) parameters[i] = found[i];
  return dx;
}

struct SwitchNorm : torch::autograd::Function<SwitchNorm> {
  // Output, what the backward pass needs, and the number of values of `Head`.
  static std::tuple<Tensor, Tensor, double> compute(
      const Call& call, const Tensor& x, const Tensor& mean_weight, const Tensor& var_weight,
      const Maybe& weight, const Maybe& bias, const Maybe& running_mean, const Maybe& running_var,
      const Maybe& residual) {
    const Layer* layer = &call.head.layer;
    Tensor y, saved, other;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      y = at::empty_like(x);
      saved = at::empty({saved_of(layer)}, at::kDouble);
      if (residual) other = residual->contiguous(call.format);
    }
    Forward given = {layer, at::get_num_threads(), call.head.relu, call.momentum,
                     x.data_ptr(), address(other), y.data_ptr(), saved.data_ptr<double>(),
                     mean_weight.data_ptr(), var_weight.data_ptr(), address(weight),
                     address(bias), address(running_mean), address(running_var),
                     static_cast<int64_t*>(address(call.counter))};
    auto run = [&](const Forward& what) {
      WithoutGil released;
      int failed = forward_of[kind_of(x)](&what);
      TORCH_CHECK_WITH(OutOfMemoryError, !failed,
                       "no memory for the statistics of an input of shape ", x.sizes());
    };
    double values = 0;
    if (call.reduce) {
      Layer own = *layer;
      own.update = 0;
      Forward moments = given;
      moments.layer = &own;
      moments.y = nullptr;
      moments.counter = nullptr;
      run(moments);
      int64_t channels = layer->channels;
      values = join(given.saved + saved.numel() - 2 * channels, channels,
                    layer->batch * layer->length, *call.reduce);
      given.given = 1;
    }
    run(given);
    for (const Maybe* t : {&running_mean, &running_var})
      if (layer->update) (*t)->unsafeGetTensorImpl()->bump_version();
    if (call.counter) call.counter->unsafeGetTensorImpl()->bump_version();
    return {y, saved, values};
  }

  static Tensor forward(AutogradContext* ctx, const Call& call, const Tensor& x,
                        const Tensor& mean_weight, const Tensor& var_weight, const Maybe& weight,
                        const Maybe& bias, const Maybe& running_mean, const Maybe& running_var,
                        const Maybe& residual) {
    auto [y, saved, values] = compute(call, x, mean_weight, var_weight, weight, bias, running_mean,
                              running_var, residual);
    // They change with the next call; in training y does not depend on them.
    bool constant = call.head.layer.running;
    bool keeps_y = call.head.relu && residual;
    ctx->save_for_backward({x, mean_weight, var_weight, weight.value_or(Tensor()),
                            bias.value_or(Tensor()), constant ? running_mean->clone() : Tensor(),
                            constant ? running_var->clone() : Tensor(),
                            keeps_y ? y : Tensor(), saved});
    Head head = call.head;
    head.values = values;
    ctx->saved_data["head"] = as_text(head);
    if (call.reduce) ctx->saved_data["reduce"] = c10::IValue::make_capsule(call.reduce);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list inputs = ctx->get_saved_variables();
    Tensor x = inputs[0], y = inputs[7], saved = inputs[8], dy = grads[0];
    Head head = from_text(ctx->saved_data["head"].toStringRef());
    if (head.values) return synchronised(ctx, head, dy, inputs);
    bool transformed = c10::impl::tls_is_dispatch_key_included(
        c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
    if (at::GradMode::is_enabled() || transformed || !is_plain(dy) || dy._fw_grad(0).defined())
      return by_formula(ctx, head, dy, inputs);
    Tensor parameters[4] = {inputs[1], inputs[2], inputs[3], inputs[4]}, d_residual;
    Tensor dx = gradients(head, dy, x, y, saved, parameters, ctx->needs_input_grad(0), &d_residual,
                          nullptr);
    return {Tensor(), dx, parameters[0], parameters[1], parameters[2], parameters[3], Tensor(),
            Tensor(), d_residual};
  }

  // Of a layer whose processes sum; once differentiable.
  static variable_list synchronised(AutogradContext* ctx, const Head& head, Tensor dy,
                                    const variable_list& inputs) {
    bool again = at::GradMode::is_enabled();
    at::AutoGradMode disabled(false);
    if (dy._is_zerotensor()) dy = dy.clone();
    dy = dy.resolve_neg();
    TORCH_CHECK(is_plain(dy) && !dy._fw_grad(0).defined(),
                "a synchronised layer takes plain gradients, got ", dy.toString());
    Tensor parameters[4] = {inputs[1], inputs[2], inputs[3], inputs[4]}, d_residual, dx;
    auto held = ctx->saved_data["reduce"].toCapsule();
    dx = gradients(head, dy, inputs[0], inputs[7], inputs[8], parameters, head.x_needed,
                   &d_residual, static_cast<Reduce*>(held.get()));
    variable_list found = {dx, parameters[0], parameters[1], parameters[2], parameters[3],
                           d_residual};
    if (again) {
      at::AutoGradMode enabled(true);
      for (Tensor& t : found)
        if (t.defined()) t = t.detach().set_requires_grad(true);
      torch::autograd::DelayedError error(
          "trying to differentiate twice a synchronised layer, which is once differentiable",
          found.size());
      found = error.apply(std::move(found));
    }
    return {Tensor(), found[0], found[1], found[2], found[3], found[4], Tensor(), Tensor(),
            found[5]};
  }

  // The gradients as a differentiable function, by the plain formula.
  static variable_list by_formula(AutogradContext* ctx, const Head& head, const Tensor& dy,
                                  const variable_list& inputs) {
    pybind11::gil_scoped_acquire gil;
    THPObjectPtr tensors(PyTuple_New(8)), needed(PyTuple_New(5));
    for (int i = 0; i < 8; i++) PyTuple_SET_ITEM(tensors.get(), i, THPVariable_Wrap(inputs[i]));
    for (int i = 0, edge = 0; i < 5; i++) {
      bool need = inputs[i].defined() && ctx->needs_input_grad(edge++);
      PyTuple_SET_ITEM(needed.get(), i, PyBool_FromLong(need));
    }
    THPObjectPtr wrapped(THPVariable_Wrap(dy));
    THPObjectPtr layer(PyBytes_FromStringAndSize(reinterpret_cast<const char*>(&head.layer),
                                                 sizeof(Layer)));
    THPObjectPtr found(PyObject_CallFunction(
        formula, "OOiiOO", wrapped.get(), layer.get(), static_cast<int>(head.relu),
        static_cast<int>(head.residual_needed), needed.get(), tensors.get()));
    if (!found) {
      python_error error;
      error.persist();
      throw error;
    }
    variable_list result(9);
    for (int i = 0; i < 8; i++) {
      PyObject* item = PyTuple_GET_ITEM(found.get(), i);
      if (item != Py_None) result[i + 1] = THPVariable_Unpack(item);
    }
    return result;
  }
};

// Fill `to`; whether `object` is what it may be. None is no tensor.
bool take(PyObject* object, Maybe* to) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  *to = THPVariable_Unpack(object);
  return is_plain(**to);
}

bool needs_grad(const Maybe& t) { return t && t->requires_grad(); }

// The arguments of `run` into `to` and `t`; whether they are usual: (x, mean_weight,
// var_weight, weight, bias, running_mean, running_var, residual, counter, layer, momentum, relu,
// reduce). `layer` is a `Layer` without a shape, as bytes; `reduce` may be None.
bool parse(PyObject* const* arguments, Py_ssize_t count, Call* to, Maybe (&t)[9]) {
  TORCH_CHECK(count == 13, "expected 13 arguments, got ", count);
  Call& call = *to;
  for (int i = 0; i < 9; i++)
    if (!take(arguments[i], t + i)) return false;
  if (!t[0]) return false;
  const Tensor& x = *t[0];
  int kind = kind_of(x);
  if (kind == KINDS || x.dim() < 2 || x.numel() == 0) return false;
  if (!parallel && at::get_num_threads() > 2) return false;
  int64_t channels = x.size(1), batch = x.size(0), length = x.numel() / (batch * channels);

  bool last = !x.is_contiguous();
  if (last && (x.dim() < 4 || x.dim() > 5)) return false;
  call.format = format_of(x, last);
  if (last && !x.is_contiguous(call.format)) return false;
  Layer& layer = call.head.layer;
  std::memcpy(&layer, PyBytes_AS_STRING(arguments[9]), sizeof(Layer));
  layer.batch = batch;
  layer.channels = channels;
  layer.length = length;
  layer.last = last || length == 1;
  if (layer.groups < 1 || batch % layer.groups) return false;
  if (layer.num_groups < 1 || channels % layer.num_groups) return false;

  auto dtype = kind == F64 ? at::kDouble : at::kFloat;
  for (int i = 1; i < 3; i++)
    if (!t[i] || !is_vector(*t[i], layer.places, dtype)) return false;
  for (int i = 3; i < 7; i++)
    if (t[i] && !is_vector(*t[i], i < 5 ? layer.affine * channels : channels, dtype)) return false;
  bool running = layer.running || layer.update;
  for (int i = 5; i < 7; i++)
    if (needs_grad(t[i]) || (running ? !t[i] : t[i].has_value())) return false;
  if (t[7] && (t[7]->sizes() != x.sizes() || t[7]->scalar_type() != x.scalar_type()))
    return false;
  if (t[8] && (t[8]->scalar_type() != at::kLong || t[8]->numel() != 1)) return false;
  for (int i : {5, 6, 8})  // those of inference mode have no versions
    if (t[i] && t[i]->is_inference()) return false;

  call.counter = t[8];
  call.momentum = layer.update ? PyFloat_AsDouble(arguments[10]) : 0.0;
  if (PyErr_Occurred()) throw python_error();
  call.head.relu = PyObject_IsTrue(arguments[11]);
  call.head.residual_needed = needs_grad(t[7]);
  call.head.x_needed = needs_grad(t[0]);
  call.head.values = 0;
  if (arguments[12] != Py_None)
    call.reduce = c10::make_intrusive<Reduce>(arguments[12]);
  return true;
}

// The output, with autograd.
PyObject* run(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Maybe t[9];
  Call call;
  if (!parse(arguments, count, &call, t)) Py_RETURN_NONE;
  const Tensor& x = *t[0];
  bool needed = false;
  for (const Maybe& each : t) needed |= needs_grad(each);
  needed &= at::GradMode::is_enabled();
  if (!needed)
    return THPVariable_Wrap(std::get<0>(
        SwitchNorm::compute(call, x, *t[1], *t[2], t[3], t[4], t[5], t[6], t[7])));
  return THPVariable_Wrap(
      SwitchNorm::apply(call, x, *t[1], *t[2], t[3], t[4], t[5], t[6], t[7]));
  END_HANDLE_TH_ERRORS
}

// setup(addresses of sn_saved, sn_state, the forward and the backward functions, parallel, formula)
PyObject* setup(PyObject*, PyObject* arguments) {
  unsigned long long at[2 + 2 * KINDS];
  int together;
  PyObject* callable;
  if (!PyArg_ParseTuple(arguments, "KKKKKKKKpO", at, at + 1, at + 2, at + 3, at + 4, at + 5, at + 6,
                        at + 7, &together, &callable))
    return nullptr;
  saved_of = reinterpret_cast<decltype(saved_of)>(at[0]);
  state_of = reinterpret_cast<decltype(state_of)>(at[1]);
  for (int kind = 0; kind < KINDS; kind++) {
    forward_of[kind] = reinterpret_cast<int (*)(const Forward*)>(at[2 + kind]);
    backward_of[kind] = reinterpret_cast<int (*)(const Backward*)>(at[2 + KINDS + kind]);
  }
  parallel = together;
  Py_INCREF(callable);
  Py_XSETREF(formula, callable);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(run)), METH_FASTCALL, nullptr},
    {"setup", setup, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "autograd", nullptr, -1, methods};

PyObject* create() {
  PyObject* made = PyModule_Create(&module);
  if (made) PyModule_AddIntConstant(made, "source", SN_SOURCE);
  return made;
}

}  // namespace

#define JOINED(prefix, name) prefix##name
#define INIT(name) JOINED(PyInit_, name)
PyMODINIT_FUNC INIT(SN_MODULE)() { return create(); }
