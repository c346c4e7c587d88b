/*
 * Whether the TLS peer has sent its close_notify.
 *
 * Run by workers, called by OpenSSL. After an end of file without a close_notify, OpenSSL gives up
 * the other direction as well, unless it is told to take the one for the other
 * (SSL_OP_IGNORE_UNEXPECTED_EOF). This callback still tells them apart. A worker has one
 * connection: one variable is enough. In C, because a callback in Python needs a page of memory
 * that is writable and executable.
 */

#include <Python.h>

#include <stdbool.h>

/* SSL_CTX_set_info_callback(3): SSL_CB_READ_ALERT; an alert is its level << 8 | description. */
#define READ_ALERT 0x4004
/* RFC 8446 §6.1. */
#define CLOSE_NOTIFY 0

static bool close_notify;

static void note(const void *ssl, int where, int value)
{
	(void)ssl;
	if (where == READ_ALERT && (value & 0xff) == CLOSE_NOTIFY)
		close_notify = true;
}

static PyObject *forget(PyObject *module, PyObject *unused)
{
	(void)module;
	(void)unused;
	close_notify = false;
	Py_RETURN_NONE;
}

static PyObject *close_notify_received(PyObject *module, PyObject *unused)
{
	(void)module;
	(void)unused;
	return PyBool_FromLong(close_notify);
}

static PyMethodDef methods[] = {
	{"forget", forget, METH_NOARGS, "forget(): the next connection begins."},
	{"close_notify_received", close_notify_received, METH_NOARGS,
	 "close_notify_received(): whether this process's connection has had one."},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "titus_py.worker.alerts",
	.m_size = 0,
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit_alerts(void);
PyMODINIT_FUNC PyInit_alerts(void)
{
	PyObject *module = PyModule_Create(&definition);
	PyObject *address = module != NULL ? PyLong_FromVoidPtr((void *)note) : NULL;
	if (address == NULL || PyModule_AddObjectRef(module, "CALLBACK", address) < 0)
		Py_CLEAR(module);
	Py_XDECREF(address);
	return module;
}
