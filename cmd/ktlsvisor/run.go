package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/config"
	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/supervise"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// configName is where the keeper's first supervisor finds the configuration.
const configName = supervise.ConfigName

// logFlags are shared by the commands that log; the keeper hands them on to the
// supervisor on its command line.
type logFlags struct {
	level string
	json  bool
}

func (l *logFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&l.level, "log-level", "info", "trace, debug, info, warn or error")
	cmd.Flags().BoolVar(&l.json, "log-json", false, "log in JSON")
}

func (l *logFlags) args() []string {
	return []string{"--log-level", l.level, fmt.Sprintf("--log-json=%v", l.json)}
}

func (l *logFlags) logger(a *app, name string) (hclog.Logger, error) {
	level := hclog.LevelFromString(l.level)
	if level == hclog.NoLevel {
		return nil, usagef("--log-level %q is none of trace, debug, info, warn, error", l.level)
	}
	return hclog.New(&hclog.LoggerOptions{Name: name, Level: level, Output: a.err, JSONFormat: l.json}), nil
}

// maxRestartPause is the longest pause before another supervisor is started, even
// after many have died: sessions that were between two workers wait for it.
const maxRestartPause = time.Second

// runFlags is what only the flags form has.
type runFlags struct {
	config.Flags
	file string
}

func (a *app) runCommand() *cobra.Command {
	var (
		f   runFlags
		log logFlags
	)
	cmd := &cobra.Command{
		Use:   "run {-c FILE | --listen ADDR {--self-signed | --cert FILE --key FILE} -- COMMAND [ARG...]}",
		Short: "Serve: terminate TLS and run the workers",
		Long: `Terminate TLS on the given addresses, run the workers and keep every connection
across their upgrades and crashes. Everything comes either from a configuration
file, or from flags and a command after "--".

SIGTERM and SIGINT end it properly, as "ktlsvisor stop" does; a second one ends it
at once. Logs go to stderr, and so does what workers print.

With --offload kernel (or offload = "kernel" in the file) it does not start on a
machine without kernel TLS. With --rekey require, sessions of TLS 1.3 use the software
layer on kernels that cannot change keys (before Linux 6.14), where a client's
KeyUpdate would otherwise end its session.

Exit code 0: stopped as asked; 1: could not serve; 2: the command line is wrong.`,
		Example: `  ktlsvisor run -c ktlsvisor.toml
  ktlsvisor run --listen :8443 --self-signed -- ./worker --its-own-flag
  ktlsvisor run --listen :443 --listen '[::1]:8443' --cert cert.pem --key key.pem --workers 4 -- ./worker`,
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := a.runConfig(cmd, &f, args)
			if err != nil {
				return err
			}
			logger, err := log.logger(a, "keeper")
			if err != nil {
				return err
			}
			return a.serve(cmd.Context(), cfg, logger, append([]string{"supervise"}, log.args()...))
		},
	}
	fl := cmd.Flags()
	fl.StringVarP(&f.file, "config", "c", "", "configuration file (TOML)")
	fl.StringArrayVar(&f.Listen, "listen", nil, "`ADDR`ess to listen on, host:port; may be repeated")
	fl.BoolVar(&f.SelfSigned, "self-signed", false, "make a certificate in memory")
	fl.StringVar(&f.Cert, "cert", "", "certificate and its chain, a PEM `file`")
	fl.StringVar(&f.Key, "key", "", "the certificate's private key, a PEM `file`")
	fl.IntVar(&f.Workers, "workers", config.DefaultWorkers, "worker processes")
	fl.StringVar(&f.Offload, "offload", config.OffloadAuto, "record layer: auto, kernel or software")
	fl.StringVar(&f.Rekey, "rekey", config.RekeyAuto, "auto, or require: TLS 1.3 only where its keys can be changed")
	fl.StringVar(&f.Pool, "pool", config.DefaultPool, "name of the pool that the workers form")
	log.add(cmd)
	return cmd
}

// runConfig makes one configuration of either form and refuses a mixture.
func (a *app) runConfig(cmd *cobra.Command, f *runFlags, args []string) (*config.Config, error) {
	dash := cmd.ArgsLenAtDash()
	switch {
	case dash > 0, dash < 0 && len(args) > 0:
		return nil, usagef("%q is not a flag; the worker's command comes after \"--\"", args[0])
	case f.file != "":
		for _, name := range []string{"listen", "self-signed", "cert", "key", "workers", "offload", "rekey", "pool"} {
			if cmd.Flags().Changed(name) {
				return nil, usagef("--%s does not go with -c: it belongs into %s", name, f.file)
			}
		}
		if len(args) > 0 {
			return nil, usagef("a command does not go with -c: it belongs into %s", f.file)
		}
	case cmd.Flags().Changed("config"):
		return nil, usagef("-c needs a file's name")
	case len(f.Listen) == 0 && len(args) == 0:
		return nil, usagef("give a configuration with -c, or --listen and a command")
	case len(f.Listen) == 0:
		return nil, usagef("--listen is missing, for example --listen :8443")
	case len(args) == 0:
		return nil, usagef("the worker's command is missing; put it last, after \"--\"")
	case f.SelfSigned && (f.Cert != "" || f.Key != ""):
		return nil, usagef("--self-signed does not go with --cert and --key")
	case !f.SelfSigned && (f.Cert == "" || f.Key == ""):
		return nil, usagef("no certificate: give --cert and --key, or --self-signed to make one in memory")
	case f.Pool == "":
		return nil, usagef("--pool needs a name")
	}
	var cfg *config.Config
	var err error
	if f.file != "" {
		cfg, err = config.Load(f.file)
	} else {
		f.Command = args
		cfg, err = config.FromFlags(f.Flags)
	}
	if err != nil {
		rerr := a.reportConfig(err)
		if f.file == "" && wrongFlags(err) {
			fmt.Fprintf(a.err, "Try %q.\n", a.helpHint())
			rerr = quietly(exitUsage)
		}
		return nil, rerr
	}
	if err := checkKernel(cfg, ktls.Probe); err != nil {
		return nil, a.reportConfig(err)
	}
	if a.adminArg != "" || cfg.Admin == "" {
		cfg.Admin = admin.Path(a.adminArg)
	}
	if cfg.Admin, err = filepath.Abs(cfg.Admin); err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	return cfg, nil
}

// serve is the keeper: this process holds what must outlive the supervisor.
func (a *app) serve(ctx context.Context, cfg *config.Config, log hclog.Logger, args []string) error {
	self, err := ownPath()
	if err != nil {
		return err
	}
	data, err := cfg.Encode()
	if err != nil {
		return err
	}
	blob, err := sys.SealedMemfd("ktlsvisor-config", data)
	if err != nil {
		return err
	}
	ctx, stop := endOnSignals(ctx, log)
	defer stop()
	code, err := keeper.Run(ctx, keeper.Config{
		Supervisor: append([]string{self}, args...),
		Log:        log,
		Grace:      keeperGrace(cfg),
		Backoff:    keeper.Backoff{Max: maxRestartPause},
		Initial:    []keeper.Entry{{Key: keeper.Key{Kind: keeper.KindBlob, Name: configName}, FDs: []int{blob}}},
		Output:     a.err,
	})
	// Without a keeper a worker's sessions can go nowhere any more.
	if n := killDescendants(); n > 0 {
		log.Warn("processes that were still running have been killed", "count", n)
	}
	if rerr := admin.RemoveStale(cfg.Admin); rerr != nil && !errors.Is(rerr, admin.ErrInUse) {
		log.Debug("the admin socket was not removed", "error", rerr)
	}
	if err != nil {
		return &codedError{max(code, exitFailed), err}
	}
	return quietly(code)
}

// keeperGrace lets every pool's workers have their time before the keeper loses
// its patience with the supervisor.
func keeperGrace(cfg *config.Config) time.Duration {
	grace := config.DefaultStopTimeout.D()
	for i := range cfg.Pools {
		grace = max(grace, cfg.Pools[i].StopTimeout.D())
	}
	return grace + 20*time.Second
}

// endOnSignals ends the context at the first SIGTERM or SIGINT, and the process
// with all its descendants at the second.
func endOnSignals(parent context.Context, log hclog.Logger) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(parent)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		select {
		case s := <-signals:
			log.Info("ending; a second signal ends at once", "signal", s.String())
			cancel()
		case <-ctx.Done():
			return
		}
		s := <-signals
		log.Warn("ending at once", "signal", s.String())
		killDescendants()
		os.Exit(exitFailed)
	}()
	return ctx, cancel
}

// ownPath is this program's path as it was started, for the next supervisor is
// whatever is there by then. Symbolic links stay, so that switching one is a way
// to replace the program; /proc/self/exe would be the old one.
func ownPath() (string, error) {
	path, err := exec.LookPath(os.Args[0])
	if errors.Is(err, exec.ErrDot) {
		err = nil
	}
	if err != nil || strings.HasPrefix(path, "/proc/") {
		path, err = os.Executable()
	}
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return "", fmt.Errorf("find the path of this program, from which supervisors are started: %w", err)
	}
	return path, nil
}
