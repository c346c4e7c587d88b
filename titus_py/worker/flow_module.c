/*
 * flow.c as a module of Python's.
 *
 * Run by workers. OpenSSL's functions come as addresses, from the fork server: they have to be
 * those of the copy that pyOpenSSL uses. Python's lock is held: a worker has one thread.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "flow.h"

/* More than the longest record. */
#define LEAST_OCTETS 65536

static struct openssl openssl;

static PyObject *use(PyObject *module, PyObject *args)
{
	unsigned long long read, write, get_error, bio_read, bio_write;

	(void)module;
	if (!PyArg_ParseTuple(args, "KKKKK", &read, &write, &get_error, &bio_read, &bio_write))
		return NULL;
	openssl.read = (int (*)(void *, void *, int))(uintptr_t)read;
	openssl.write = (int (*)(void *, const void *, int))(uintptr_t)write;
	openssl.get_error = (int (*)(const void *, int))(uintptr_t)get_error;
	openssl.bio_read = (int (*)(void *, void *, int))(uintptr_t)bio_read;
	openssl.bio_write = (int (*)(void *, const void *, int))(uintptr_t)bio_write;
	Py_RETURN_NONE;
}

/* A buffer, the part of it that is still to be passed on, a count. */
struct views {
	Py_buffer buffer, rest, count;
};

static bool open_views(struct views *views, struct buffer *buffer, volatile uint64_t **count)
{
	buffer->octets = views->buffer.buf;
	buffer->size = (size_t)views->buffer.len;
	if (views->rest.len > 0) {
		buffer->begin = (uintptr_t)views->rest.buf - (uintptr_t)buffer->octets;
		buffer->end = buffer->begin + (size_t)views->rest.len;
	}
	*count = views->count.buf;
	if (buffer->size >= LEAST_OCTETS && buffer->begin <= buffer->end && buffer->end <= buffer->size
	    && views->count.len == sizeof **count)
		return true;
	PyErr_SetString(PyExc_ValueError, "not a buffer, a part of it, and a count");
	return false;
}

static PyObject *rest_of(const struct views *views, const struct buffer *buffer)
{
	return PySequence_GetSlice(views->buffer.obj, (Py_ssize_t)buffer->begin, (Py_ssize_t)buffer->end);
}

static PyObject *run(PyObject *module, PyObject *args)
{
	struct views up, down, out;
	unsigned long long ssl, into_ssl, from_ssl, allowance;
	struct flow flow = {0};
	int patience, up_state, down_state;
	PyObject *answer = NULL;

	(void)module;
	if (!PyArg_ParseTuple(args, "(KKK)iii(w*w*w*i)(w*w*w*i)(w*w*w*)K", &ssl, &into_ssl, &from_ssl,
			      &flow.client, &flow.backend, &patience, &up.buffer, &up.rest, &up.count,
			      &up_state, &down.buffer, &down.rest, &down.count, &down_state, &out.buffer,
			      &out.rest, &out.count, &allowance))
		return NULL;
	flow.ssl = (void *)(uintptr_t)ssl;
	flow.into_ssl = (void *)(uintptr_t)into_ssl;
	flow.from_ssl = (void *)(uintptr_t)from_ssl;
	flow.up = (enum state)up_state;
	flow.down = (enum state)down_state;
	flow.allowance = allowance;
	if (open_views(&up, &flow.to_backend, &flow.from_client_count)
	    && open_views(&down, &flow.to_client, &flow.to_client_count)
	    && open_views(&out, &flow.encrypted, &flow.encrypted_count)) {
		int happened = (int)pass_on(&flow, &openssl, patience);

		answer = Py_BuildValue("iNiiNNNK", happened, PyBool_FromLong(flow.woken), flow.result,
				       flow.number, rest_of(&up, &flow.to_backend),
				       rest_of(&down, &flow.to_client), rest_of(&out, &flow.encrypted),
				       (unsigned long long)flow.allowance);
	}
	for (struct views *const *each = (struct views *const[]){&up, &down, &out, NULL}; *each; each++) {
		PyBuffer_Release(&(*each)->buffer);
		PyBuffer_Release(&(*each)->rest);
		PyBuffer_Release(&(*each)->count);
	}
	return answer;
}

static PyMethodDef methods[] = {
	{"use", use, METH_VARARGS,
	 "use(read, write, get_error, bio_read, bio_write): the addresses of OpenSSL's functions."},
	{"run", run, METH_VARARGS,
	 "run(tls, client, backend, patience, to_backend, to_client, encrypted, allowance): pass octets "
	 "on until something else happens."},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "titus_py.worker.flow",
	.m_size = 0,
	.m_methods = methods,
};

static const struct {
	const char *name;
	int value;
} constants[] = {
	{"STOOD_STILL", STOOD_STILL},
	{"INTERRUPTED", INTERRUPTED},
	{"CLIENT_ENDED", CLIENT_ENDED},
	{"CLIENT_TRUNCATED", CLIENT_TRUNCATED},
	{"BACKEND_ENDED", BACKEND_ENDED},
	{"CLIENT_SPOKE", CLIENT_SPOKE},
	{"ALL_TO_BACKEND", ALL_TO_BACKEND},
	{"ALL_TO_CLIENT", ALL_TO_CLIENT},
	{"CLIENT_FAILED", CLIENT_FAILED},
	{"NOT_DECRYPTED", NOT_DECRYPTED},
	{"NOT_ENCRYPTED", NOT_ENCRYPTED},
	{"NOT_FROM_CLIENT", NOT_FROM_CLIENT},
	{"NOT_TO_CLIENT", NOT_TO_CLIENT},
	{"NOT_FROM_BACKEND", NOT_FROM_BACKEND},
	{"NOT_TO_BACKEND", NOT_TO_BACKEND},
	{"OPEN", OPEN},
	{"HELD_UP", HELD_UP},
	{"ENDING", ENDING},
	{"OVER", OVER},
};

PyMODINIT_FUNC PyInit_flow(void);
PyMODINIT_FUNC PyInit_flow(void)
{
	PyObject *module = PyModule_Create(&definition);

	for (size_t at = 0; module != NULL && at < sizeof constants / sizeof *constants; at++)
		if (PyModule_AddIntConstant(module, constants[at].name, constants[at].value) < 0)
			Py_CLEAR(module);
	return module;
}
