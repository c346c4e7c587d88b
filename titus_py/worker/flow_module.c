/*
 * flow.c as a module of Python's.
 *
 * Run by workers. OpenSSL's functions come as addresses, from the fork server: they have to be
 * those of the copy that pyOpenSSL uses. Python's lock is held: a worker has one thread.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "flow.h"

/* The longest plaintext of a record: what the smallest buffer has room for. */
#define LEAST_OCTETS 16384

static struct openssl openssl;

static PyObject *use(PyObject *module, PyObject *args)
{
	unsigned long long read, write, get_error, pending;

	(void)module;
	if (!PyArg_ParseTuple(args, "KKKK", &read, &write, &get_error, &pending))
		return NULL;
	openssl.read = (int (*)(void *, void *, int))(uintptr_t)read;
	openssl.write = (int (*)(void *, const void *, int))(uintptr_t)write;
	openssl.get_error = (int (*)(const void *, int))(uintptr_t)get_error;
	openssl.pending = (int (*)(const void *))(uintptr_t)pending;
	Py_RETURN_NONE;
}

/* A direction: its buffer, the part of that which is still to be passed on, its count. */
static bool open_way(struct way *way, const Py_buffer *buffer, const Py_buffer *rest,
		     const Py_buffer *count)
{
	way->octets = buffer->buf;
	way->size = (size_t)buffer->len;
	if (rest->len > 0) {
		way->begin = (uintptr_t)rest->buf - (uintptr_t)buffer->buf;
		way->end = way->begin + (size_t)rest->len;
	}
	way->count = count->buf;
	if (way->size >= LEAST_OCTETS && way->begin <= way->end && way->end <= way->size
	    && count->len == sizeof *way->count)
		return true;
	PyErr_SetString(PyExc_ValueError, "not a buffer, a part of it, and a count");
	return false;
}

static PyObject *rest_of(const struct way *way, const Py_buffer *buffer)
{
	return PySequence_GetSlice(buffer->obj, (Py_ssize_t)way->begin, (Py_ssize_t)way->end);
}

static PyObject *run(PyObject *module, PyObject *args)
{
	Py_buffer up[3], down[3];
	unsigned long long ssl;
	struct flow flow = {0};
	int patience, up_open, down_open;
	PyObject *answer = NULL;

	(void)module;
	if (!PyArg_ParseTuple(args, "Kiii(w*w*w*p)(w*w*w*p)", &ssl, &flow.client, &flow.backend,
			      &patience, &up[0], &up[1], &up[2], &up_open, &down[0], &down[1],
			      &down[2], &down_open))
		return NULL;
	flow.ssl = (void *)(uintptr_t)ssl;
	flow.to_backend.open = up_open;
	flow.to_client.open = down_open;
	if (open_way(&flow.to_backend, &up[0], &up[1], &up[2])
	    && open_way(&flow.to_client, &down[0], &down[1], &down[2])) {
		int happened = (int)pass_on(&flow, &openssl, patience);

		answer = Py_BuildValue("iNiiNN", happened, PyBool_FromLong(flow.woken), flow.result,
				       flow.number, rest_of(&flow.to_backend, &up[0]),
				       rest_of(&flow.to_client, &down[0]));
	}
	for (int at = 0; at < 3; at++) {
		PyBuffer_Release(&up[at]);
		PyBuffer_Release(&down[at]);
	}
	return answer;
}

static PyMethodDef methods[] = {
	{"use", use, METH_VARARGS,
	 "use(read, write, get_error, pending): the addresses of OpenSSL's functions."},
	{"run", run, METH_VARARGS,
	 "run(ssl, client, backend, patience, to_backend, to_client): pass octets on until something "
	 "else happens."},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "titus_py.worker.flow",
	.m_size = 0,
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit_flow(void);
PyMODINIT_FUNC PyInit_flow(void)
{
	PyObject *module = PyModule_Create(&definition);

	if (module != NULL
	    && (PyModule_AddIntMacro(module, STOOD_STILL) < 0 || PyModule_AddIntMacro(module, UNUSUAL) < 0
		|| PyModule_AddIntMacro(module, CLIENT_ENDED) < 0
		|| PyModule_AddIntMacro(module, BACKEND_ENDED) < 0
		|| PyModule_AddIntMacro(module, NOT_READ) < 0
		|| PyModule_AddIntMacro(module, NOT_WRITTEN) < 0
		|| PyModule_AddIntMacro(module, NOT_SENT) < 0
		|| PyModule_AddIntMacro(module, NOT_RECEIVED) < 0))
		Py_CLEAR(module);
	return module;
}
