package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
)

func (o options) ktlsvisor() *server {
	var u *visor.Unit
	return &server{name: "ktlsvisor", stop: func() {
		if u != nil {
			u.Kill()
		}
	},
		start: func(dir string) (err error) {
			u, err = visor.Start(visor.Options{Program: filepath.Join(o.bin, "ktlsvisor"), Command: []string{filepath.Join(o.bin, "echo")}, Dir: dir})
			return err
		},
		addr: func() string { return u.Addr },
		old: func() []int {
			st, err := u.Admin.Status(context.Background())
			if err != nil {
				return nil
			}
			return visor.WorkerPIDs(st)
		},
		reload: func() error {
			r, err := u.Admin.Upgrade(context.Background(), admin.UpgradeRequest{}, nil)
			if err == nil && r.Outcome != admin.OutcomeMoved {
				err = fmt.Errorf("upgrade: %+v", r)
			}
			return err
		}}
}

// daemon is a server that runs as a child with files in a folder.
type daemon struct {
	cmd  *exec.Cmd
	port int
}

func (d *daemon) addr() string { return fmt.Sprintf("127.0.0.1:%d", d.port) }

func (d *daemon) run(dir string, env []string, args ...string) error {
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return err
	}
	defer log.Close()
	d.cmd = exec.Command(args[0], args[1:]...)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.Env = append(os.Environ(), env...)
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return d.cmd.Start()
}

// stop ends the daemon and everything it started: its process group.
func (d *daemon) stop() {
	if d.cmd == nil || d.cmd.Process == nil {
		return
	}
	_ = syscall.Kill(-d.cmd.Process.Pid, syscall.SIGKILL)
	_ = d.cmd.Wait()
}

// children are the processes that the daemon's master has started.
func (d *daemon) children() (pids []int) {
	pid := d.cmd.Process.Pid
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return nil
	}
	for _, f := range strings.Fields(string(b)) {
		if n, err := strconv.Atoi(f); err == nil {
			pids = append(pids, n)
		}
	}
	return pids
}

func freePort() (int, error) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr).Port, nil
}

func label(name string, limit time.Duration) string {
	if limit == 0 {
		return name
	}
	return fmt.Sprintf("%s, old processes end after %s", name, limit)
}

func nginxPeer(root string, limit time.Duration, cred credentials, backend string) *server {
	d := &daemon{}
	return &server{name: label("nginx (stream)", limit), addr: d.addr, stop: d.stop, old: d.children,
		start: func(dir string) (err error) {
			if d.port, err = freePort(); err != nil {
				return err
			}
			shutdown := ""
			if limit > 0 {
				shutdown = fmt.Sprintf("worker_shutdown_timeout %ds;", int(limit.Seconds()))
			}
			conf := filepath.Join(dir, "nginx.conf")
			if err := os.WriteFile(conf, []byte(fmt.Sprintf(`
load_module %s/usr/lib/nginx/modules/ngx_stream_module.so;
daemon off; worker_processes 2; pid %s/pid; error_log stderr; %s
events { worker_connections 4096; }
stream { server { listen 127.0.0.1:%d ssl; ssl_certificate %s; ssl_certificate_key %s; proxy_pass %s; } }
`, root, dir, shutdown, d.port, cred.cert, cred.key, backend)), 0o644); err != nil {
				return err
			}
			return d.run(dir, nil, filepath.Join(root, "usr/sbin/nginx"), "-c", conf, "-p", dir)
		},
		reload: func() error { return d.cmd.Process.Signal(syscall.SIGHUP) }}
}

func haproxyPeer(root string, limit time.Duration, cred credentials, backend string) *server {
	d := &daemon{}
	return &server{name: label("HAProxy (tcp)", limit), addr: d.addr, stop: d.stop, old: d.children,
		start: func(dir string) (err error) {
			if d.port, err = freePort(); err != nil {
				return err
			}
			hard := ""
			if limit > 0 {
				hard = fmt.Sprintf("\n  hard-stop-after %ds", int(limit.Seconds()))
			}
			conf := filepath.Join(dir, "haproxy.cfg")
			if err := os.WriteFile(conf, []byte(fmt.Sprintf(`global
  maxconn 8192%s
defaults
  mode tcp
  timeout connect 5s
  timeout client 1h
  timeout server 1h
listen echo
  bind 127.0.0.1:%d ssl crt %s
  server one %s
`, hard, d.port, cred.both, backend)), 0o644); err != nil {
				return err
			}
			return d.run(dir, []string{"LD_LIBRARY_PATH=" + filepath.Join(root, "usr/lib/x86_64-linux-gnu")},
				filepath.Join(root, "usr/sbin/haproxy"), "-W", "-f", conf)
		},
		reload: func() error { return d.cmd.Process.Signal(syscall.SIGUSR2) }}
}

func tableflipPeer(limit time.Duration, cred credentials) *server {
	d := &daemon{}
	return &server{name: label("tableflip (crypto/tls)", limit), addr: d.addr, stop: d.stop,
		start: func(dir string) (err error) {
			if d.port, err = freePort(); err != nil {
				return err
			}
			self, err := os.Executable()
			if err != nil {
				return err
			}
			return d.run(dir, []string{roleEnv + "=tableflip"}, self, d.addr(), cred.cert, cred.key, limit.String())
		},
		old:    func() []int { return []int{d.cmd.Process.Pid} },
		reload: func() error { return d.cmd.Process.Signal(syscall.SIGHUP) }}
}
