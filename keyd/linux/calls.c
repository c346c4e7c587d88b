/*
 * Makes system calls: one, or a list of them, in order; and gives Python the memory that they take.
 *
 * Run by workers, by the fork server, and by whoever gives up privileges. Python has no way of its
 * own to make just these calls. ctypes would cost a worker some pages for each, and each fork its
 * libraries' mappings.
 */

#include "calls.h"

#include <errno.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The numbers of the calls that are made, on this architecture. */
static const struct {
	const char *name;
	int number;
} numbers[] = {
	{"capget", SYS_capget},
	{"capset", SYS_capset},
	{"close_range", SYS_close_range},
	{"dup3", SYS_dup3},
	{"landlock_add_rule", SYS_landlock_add_rule},
	{"landlock_create_ruleset", SYS_landlock_create_ruleset},
	{"landlock_restrict_self", SYS_landlock_restrict_self},
	{"madvise", SYS_madvise},
	{"mlockall", SYS_mlockall},
	{"mmap", SYS_mmap},
	{"munmap", SYS_munmap},
	{"prctl", SYS_prctl},
	{"prlimit64", SYS_prlimit64},
	{"pwrite64", SYS_pwrite64},
	{"seccomp", SYS_seccomp},
	{"setgroups", SYS_setgroups},
	{"setns", SYS_setns},
	{"setresgid", SYS_setresgid},
	{"setresuid", SYS_setresuid},
	{"shutdown", SYS_shutdown},
	{"unshare", SYS_unshare},
};
#define CALLS (sizeof(numbers) / sizeof(numbers[0]))

static PyObject *make(PyObject *module, PyObject *args)
{
	Py_buffer octets;
	struct calls calls;
	(void)module;
	if (!PyArg_ParseTuple(args, "y*", &octets))
		return NULL;
	int failed = take_calls(octets.buf, octets.len, &calls);
	for (Py_ssize_t at = 0; failed == 0 && at < calls.count; at++) {
		const int64_t *argument = calls.first[at].arguments;
		if (syscall(calls.first[at].number, argument[0], argument[1], argument[2],
		            argument[3], argument[4], argument[5]) == -1) {
			PyErr_SetFromErrno(PyExc_OSError);
			failed = -1;
		}
	}
	PyBuffer_Release(&octets);
	if (failed < 0)
		return NULL;
	Py_RETURN_NONE;
}

static PyObject *failed(const char *name)
{
	const int error = errno;
	PyObject *reason = Py_BuildValue("iN", error,
	                                 PyUnicode_FromFormat("%s: %s", name, strerror(error)));
	if (reason != NULL)
		PyErr_SetObject(PyExc_OSError, reason);
	Py_XDECREF(reason);
	return NULL;
}

static PyObject *call(PyObject *module, PyObject *const *given, Py_ssize_t count)
{
	long arguments[6] = {0};
	size_t at = 0;
	(void)module;
	if (count < 1 || count > 7) {
		PyErr_SetString(PyExc_TypeError, "not a name and at most six arguments");
		return NULL;
	}
	const char *name = PyUnicode_AsUTF8(given[0]);
	if (name == NULL)
		return NULL;
	while (at < CALLS && strcmp(numbers[at].name, name) != 0)
		at++;
	if (at == CALLS)
		return PyErr_Format(PyExc_ValueError, "no call of this module's: %s", name);
	for (Py_ssize_t number = 1; number < count; number++) {
		arguments[number - 1] = PyLong_AsLong(given[number]);
		if (arguments[number - 1] == -1 && PyErr_Occurred())
			return NULL;
	}
	const long result = syscall(numbers[at].number, arguments[0], arguments[1], arguments[2],
	                            arguments[3], arguments[4], arguments[5]);
	return result == -1 ? failed(name) : PyLong_FromLong(result);
}

static PyObject *address(PyObject *module, PyObject *object)
{
	Py_buffer octets;
	(void)module;
	if (PyObject_GetBuffer(object, &octets, PyBUF_SIMPLE) < 0)
		return NULL;
	PyObject *place = PyLong_FromVoidPtr(octets.buf);
	PyBuffer_Release(&octets);
	return place;
}

static PyObject *memory(PyObject *module, PyObject *args)
{
	unsigned long place;
	Py_ssize_t octets;
	(void)module;
	if (!PyArg_ParseTuple(args, "kn", &place, &octets))
		return NULL;
	return PyMemoryView_FromMemory((char *)place, octets, PyBUF_WRITE);
}

static PyMethodDef methods[] = {
	{"call", (PyCFunction)(void (*)(void))call, METH_FASTCALL, "See calls.pyi."},
	{"address", address, METH_O, "See calls.pyi."},
	{"memory", memory, METH_VARARGS, "See calls.pyi."},
	{"make", make, METH_VARARGS,
	 "make(calls): make them, in order; raises OSError for the first that fails."},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "keyd.linux.calls",
	.m_size = 0,
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit_calls(void);
PyMODINIT_FUNC PyInit_calls(void)
{
	PyObject *module = PyModule_Create(&definition);
	PyObject *table = module != NULL ? PyDict_New() : NULL;
	if (table == NULL)
		goto failed;
	for (size_t at = 0; at < CALLS; at++) {
		PyObject *number = PyLong_FromLong(numbers[at].number);
		const int result =
			number != NULL ? PyDict_SetItemString(table, numbers[at].name, number) : -1;
		Py_XDECREF(number);
		if (result < 0)
			goto failed;
	}
	if (PyModule_AddObjectRef(module, "NUMBERS", table) < 0)
		goto failed;
	Py_DECREF(table);
	return module;
failed:
	Py_XDECREF(table);
	Py_XDECREF(module);
	return NULL;
}
