/*
 * Makes objects immortal (PEP 683).
 *
 * Run by the fork server, before it forks. Python counts, in each object, the references to it. So
 * a worker that only looks at an inherited object writes to its page, and the kernel has to copy
 * the page. The count of an immortal object never changes. Python itself has no call for this. No
 * worker frees what it inherits, so nothing is lost.
 *
 * An extension that was compiled for Python 3.11 or earlier changes the count all the same. That
 * does no harm: the count is 2**32 - 1, and only a count of 0 frees an object.
 */

#include <Python.h>

/* Python 3.11 has no such objects. Python 3.14 keeps other things beside the count. */
#if PY_VERSION_HEX >= 0x030c0000 && PY_VERSION_HEX < 0x030e0000 && !defined(Py_GIL_DISABLED)
#define AVAILABLE 1
#else
#define AVAILABLE 0
#define _Py_IsImmortal(object) ((void)(object), 1)
#define _Py_IMMORTAL_REFCNT 0
#endif

static PyObject *immortalize(PyObject *module, PyObject *objects)
{
	(void)module;
	if (!PyList_Check(objects)) {
		PyErr_SetString(PyExc_TypeError, "not a list");
		return NULL;
	}
	PyObject *made = PyList_New(0);
	for (Py_ssize_t at = 0; made != NULL && at < PyList_GET_SIZE(objects); at++) {
		PyObject *object = PyList_GET_ITEM(objects, at);
		if (_Py_IsImmortal(object))
			continue;
		Py_SET_REFCNT(object, _Py_IMMORTAL_REFCNT);
		if (PyList_Append(made, object) < 0)
			Py_CLEAR(made);
	}
	return made;
}

static PyMethodDef methods[] = {
	{"immortalize", immortalize, METH_O,
	 "immortalize(objects): make those in a list immortal; returns a list of those that were not."},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "titus_py.fork_server.immortal",
	.m_size = 0,
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit_immortal(void);
PyMODINIT_FUNC PyInit_immortal(void)
{
	PyObject *module = PyModule_Create(&definition);
	PyObject *available = AVAILABLE ? Py_True : Py_False;
	if (module != NULL && PyModule_AddObjectRef(module, "AVAILABLE", available) < 0)
		Py_CLEAR(module);
	return module;
}
