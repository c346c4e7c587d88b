/*
 * Asks Python whether a peer's certificate is good: a client's, or that of a tunnel's server.
 *
 * Run by workers, called by OpenSSL once for each certificate of a chain and for each fault that
 * OpenSSL finds (SSL_CTX_set_verify(3)). Python decides two things during the handshake, so that
 * the peer gets an alert: whether a name or a key is on the list, and that a key on the list
 * needs no authority. In C, because a callback in Python needs a page of memory that is writable
 * and executable. A worker has one connection: one function is enough. Loaded only where a virtual
 * host asks for client certificates, or for a tunnel.
 */

#include <Python.h>

static PyObject *judge;

/* Refuses the certificate if there is no function, or if the function raises an exception. */
static int verify(int good, void *store_context)
{
	PyGILState_STATE state = PyGILState_Ensure();
	PyObject *context = PyLong_FromVoidPtr(store_context);
	PyObject *verdict = NULL;
	int accepted;

	if (judge != NULL && context != NULL)
		verdict = PyObject_CallFunction(judge, "iO", good, context);
	accepted = verdict == Py_True;
	/* An exception cannot be reported from here. The handshake fails. */
	PyErr_Clear();
	Py_XDECREF(verdict);
	Py_XDECREF(context);
	PyGILState_Release(state);
	return accepted;
}

static PyObject *ask(PyObject *module, PyObject *function)
{
	(void)module;
	Py_XSETREF(judge, Py_NewRef(function));
	Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
	{"ask", ask, METH_O,
	 "ask(judge): call judge(good: int, store_context: int); only True is a yes."},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "titus_py.worker.verification",
	.m_size = 0,
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit_verification(void);
PyMODINIT_FUNC PyInit_verification(void)
{
	PyObject *module = PyModule_Create(&definition);
	PyObject *address = module != NULL ? PyLong_FromVoidPtr((void *)verify) : NULL;
	if (address == NULL || PyModule_AddObjectRef(module, "CALLBACK", address) < 0)
		Py_CLEAR(module);
	Py_XDECREF(address);
	return module;
}
